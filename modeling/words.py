# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""The words of a caption, with character offsets and the tokens that each consists of."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

_FUNCTION_WORDS = """
    a an the this that these those some any each every either neither no another other others both all several many
    much few more most such own same one two three four five six seven eight nine ten
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself yourself
    himself herself itself ourselves themselves who whom whose which what something someone
    of in on at by for with without from to into onto upon over under above below beneath beside besides between among
    around about across along through against near behind before after during toward towards off out up down inside
    outside within next atop amid via than as
    and or but nor so yet if while when where because although though until unless whether since
    is are was were be been being am do does did doing done has have had having would could should
    not there here also too very just then only together
"""
# English words without a place in a picture: determiners and numbers, pronouns, prepositions, conjunctions,
# auxiliaries, particles. Words that are as often a thing ("can", "left", "top") are not among them.
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_CONTRACTION = re.compile(r"(n['’]t|['’]\w*)$")


@dataclass(frozen=True)
class Word:
    """A word or punctuation mark of a caption.

    Attributes:
        text: `caption[start:end]`.
        start, end: character offsets, end exclusive.
        tokens: positions of its pieces among the tokens of the caption, special tokens counted.
        is_content: neither a function word (see `FUNCTION_WORDS`) nor punctuation.
        is_special: a special token such as [CLS], which stands for no part of the caption: `text` is its name.
    """

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    is_content: bool
    is_special: bool = field(default=False, kw_only=True)


_W = TypeVar("_W", bound=Word)


def words_of(caption: str, tokenizer) -> list[Word]:
    """The words of a caption and the tokens that each consists of.

    A word is a run of letters and digits, with apostrophes and hyphens inside it; any other visible character is a
    word of its own. A token belongs to the first word that it touches, a token of spaces to none. Words without a
    token of their own are left out: those that truncation cut off, or that share one token with the word before.

    Args:
        tokenizer: a fast tokenizer; it is asked for one caption, without padding.

    Raises:
        ValueError: the caption is empty or no string, or the tokenizer is not a fast one.
    """
    check_caption(caption, tokenizer)
    return merge_pieces(caption, tokenizer(caption, truncation=True, return_offsets_mapping=True)["offset_mapping"])


def words_within(words: Sequence[_W], start: int, end: int) -> list[_W]:
    """The content words that touch the characters `start` to `end`; of all words there, if none has content."""
    touched = [word for word in words if max(word.start, start) < min(word.end, end)]
    return [word for word in touched if word.is_content] or touched


def check_caption(caption: Any, tokenizer: Any) -> None:
    """Raises ValueError unless the caption has a word and the tokenizer knows where its tokens stand."""
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"`caption` must be a sentence of at least one word, got {caption!r}.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Words need character offsets, which only fast tokenizers have, got {type(tokenizer).__name__}. Load the "
            "tokenizer with AutoTokenizer."
        )


def merge_pieces(caption: str, offsets: Sequence[Sequence[int]]) -> list[Word]:
    """Words of the caption with the positions of their tokens, from the (start, end) of each token.

    Special tokens and padding are at (0, 0) and touch no word.
    """
    # Combining marks are no \w, yet they belong to the letter before them.
    plain = "".join("x" if unicodedata.category(character)[0] == "M" else character for character in caption)
    spans = [match.span() for match in _WORD.finditer(plain)]
    tokens: dict[tuple[int, int], list[int]] = {span: [] for span in spans}
    for position, (start, end) in enumerate(offsets):
        # Some tokenizers count the space before a word to its first piece.
        home = next((span for span in spans if span[0] < end and start < span[1]), None)
        if home is not None:
            tokens[home].append(position)
    return [
        Word(caption[start:end], start, end, tuple(tokens[start, end]), _is_content(caption[start:end]))
        for start, end in spans
        if tokens[start, end]
    ]


def with_other_tokens(
    words: Sequence[Word],
    caption: str,
    offsets: Sequence[Sequence[int]],
    input_ids: Sequence[int],
    is_token: Sequence[bool],
    tokenizer,
) -> list[Word]:
    """The words, and as words of their own the tokens that belong to none: special tokens, and those of spaces.

    Args:
        offsets, input_ids, is_token: of each token its (start, end), its id, and whether it takes part in the score.

    Returns:
        Words in the order of their tokens. A special token stands at no character; its text is its name.
    """
    taken = {token for word in words for token in word.tokens}
    names = tokenizer.convert_ids_to_tokens(list(input_ids))
    others = []
    for token, (start, end) in enumerate(offsets):
        if is_token[token] and token not in taken:
            is_special = input_ids[token] in tokenizer.all_special_ids
            text = caption[start:end] or names[token]
            others.append(Word(text, start, end, (token,), is_content=False, is_special=is_special))
    return sorted([*words, *others], key=lambda word: word.tokens)


def _is_content(text: str) -> bool:
    stem = _CONTRACTION.sub("", text.lower())
    return any(character.isalnum() for character in text) and stem not in FUNCTION_WORDS
