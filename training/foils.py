"""Which word is wrong? Captions with one thing changed, made from located phrases alone, without a language model.

A colour, a number or the head noun of a phrase that has boxes is replaced by another of its kind, or two phrases change
places. A model that reads word by word scores the true caption higher, and gives the edited word the lowest share.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from granalign_hf.grounding import summarize_hits
from granalign_hf.modeling.modeling_granalign import GranAlignModel
from granalign_hf.modeling.processing_granalign import GranAlignProcessor
from granalign_hf.modeling.words import Word, words_of, words_within
from granalign_hf.training.by_image import Encoded, measure_by_image
from granalign_hf.training.data import CaptionedImages
from granalign_hf.training.phrases import LocatedCaption, Phrase

COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
MIN_COUNT = 5  # of a head noun in the split, so that it is a usual one
SEED, VOWELS = 0, "aeiou"


@dataclass(frozen=True)
class Foil:
    """A caption of image number `image`, and the same with something wrong.

    Attributes:
        kind: "colour", "number", "noun" or "swap". spans: characters of `wrong` that were edited. before: characters of
            `caption` that stood there.
    """

    image: int
    kind: str
    caption: str
    wrong: str
    spans: tuple[tuple[int, int], ...]
    before: tuple[tuple[int, int], ...]


def make_foils(located: Sequence[LocatedCaption]) -> list[Foil]:
    """Up to one foil of each kind for every caption; which one depends on the captions only.

    A noun comes from a phrase of the same type of entity, ends in s as the other does or does not, and no caption of the
    image has it.
    """
    nouns = _nouns(located)
    foils = []
    for number, group in itertools.groupby(located, key=lambda caption: caption.image):
        captions = list(group)
        said = {word for caption in captions for word in re.findall(r"\w+", caption.caption.lower())}
        for position, caption in enumerate(captions):
            rng = np.random.default_rng((SEED, number, position))
            for kind, edits in (
                ("colour", _replaced(rng, caption, COLOURS, said)),
                ("number", _replaced(rng, caption, NUMBERS, said)),
                ("noun", _other_noun(rng, caption, nouns, said)),
                ("swap", _swapped(rng, caption)),
            ):
                if edits:
                    wrong, spans = _edited(caption.caption, edits)
                    before = tuple((start, end) for start, end, _ in sorted(edits))
                    foils.append(Foil(number, kind, caption.caption, wrong, spans, before))
    return foils


Edits = list[tuple[int, int, str]]  # start, end, what stands there instead


def _words(caption: str, phrase: Phrase) -> Iterator[tuple[int, int, str]]:
    """Start, end and lower case of the words of a phrase."""
    position = phrase.start
    for word in caption[phrase.start : phrase.end].split(" "):
        if word:
            yield position, position + len(word), word.lower()
        position += len(word) + 1


def _replaced(rng: np.random.Generator, caption: LocatedCaption, words: Sequence[str], said: set[str]) -> Edits:
    places = [place for phrase in caption.phrases for place in _words(caption.caption, phrase) if place[2] in words]
    if not places:
        return []
    return _instead(rng, caption.caption, places[rng.integers(len(places))], words, said)


def _instead(
    rng: np.random.Generator, caption: str, place: tuple[int, int, str], others: Sequence[str], said: set[str]
) -> Edits:
    """Another word that no caption says and that goes with the same article."""
    start, end, word = place
    fitting = [other for other in others if other not in said and (other[0] in VOWELS) == (word[0] in VOWELS)]
    return [(start, end, _as_written(caption[start:end], fitting[rng.integers(len(fitting))]))] if fitting else []


def _as_written(before: str, now: str) -> str:
    """With a capital where there was one, which else would give the foil away to an encoder that knows capitals."""
    first = now[:1].upper() if before[:1].isupper() else now[:1].lower()
    return first + now[1:]


def _head(caption: str, phrase: Phrase) -> tuple[int, int, str]:
    return [*_words(caption, phrase)][-1]


def _nouns(located: Sequence[LocatedCaption]) -> dict[tuple[str, bool], list[str]]:
    """Type of entity and whether it ends in s -> the usual head nouns of its phrases."""
    counts: dict[tuple[str, bool], Counter] = {}
    for caption in located:
        for phrase in caption.phrases:
            head = _head(caption.caption, phrase)[2]
            for kind in phrase.types:
                counts.setdefault((kind, head.endswith("s")), Counter())[head] += 1
    return {
        key: sorted(noun for noun, count in of_kind.items() if count >= MIN_COUNT and noun.isalpha())
        for key, of_kind in counts.items()
    }


def _other_noun(rng: np.random.Generator, caption: LocatedCaption, nouns: dict, said: set[str]) -> Edits:
    typed = [phrase for phrase in caption.phrases if phrase.types]
    if not typed:
        return []
    phrase = typed[rng.integers(len(typed))]
    place = _head(caption.caption, phrase)
    head = place[2]
    others = nouns.get((phrase.types[0], head.endswith("s")), [])
    return _instead(rng, caption.caption, place, others, said) if head.isalpha() else []


def _swapped(rng: np.random.Generator, caption: LocatedCaption) -> Edits:
    phrases = sorted(caption.phrases, key=lambda phrase: phrase.start)
    pairs = [
        (a, b)
        for a, b in itertools.combinations(phrases, 2)
        if a.end <= b.start
        and caption.caption[a.end : b.start].strip(" ,").lower() not in ("", "and", "or")  # swapped they say the same
        and caption.caption[a.start : a.end].lower() != caption.caption[b.start : b.end].lower()
    ]
    if not pairs:
        return []
    first, second = pairs[rng.integers(len(pairs))]
    texts = [caption.caption[phrase.start : phrase.end] for phrase in (first, second)]
    return [
        (first.start, first.end, _as_written(texts[0], texts[1])),
        (second.start, second.end, _as_written(texts[1], texts[0])),
    ]


def _edited(caption: str, edits: Edits) -> tuple[str, tuple[tuple[int, int], ...]]:
    text, position, spans = "", 0, []
    for start, end, new in sorted(edits):
        text += caption[position:start]
        spans.append((len(text), len(text) + len(new)))
        text, position = text + new, end
    return text + caption[position:], tuple(spans)


class _Answer(NamedTuple):
    number: int
    kind: str
    is_preferred: bool  # the true caption
    is_found: bool  # an edited word has the lowest share, of content words and edited ones
    was_lowest: bool  # a word that stood there had the lowest share of the true caption
    chance: float  # of finding one blindly


def measure_foils(
    model: GranAlignModel,
    processor: GranAlignProcessor,
    data: CaptionedImages,
    located: Sequence[LocatedCaption],
    batch_size: int,
) -> dict[str, Any]:
    """How often the true caption scores higher, and how often the edited word has the lowest share.

    Returns:
        `foils`: kind ("all" first) -> `preferred` in percent with its `low` and `high` over images, `number`, `found` with
        `found_low` and `found_high`, `was_lowest`, how often a word that stood there has the lowest share in the true
        caption, and `chance`, the mean share of those words that are edited. Equal scores count against the model.
    """
    foils = make_foils(located)
    if not foils:
        raise ValueError("No foil can be made: the phrases have no colour, number, usual noun or second phrase.")
    by_image = {number: list(group) for number, group in itertools.groupby(foils, key=lambda foil: foil.image)}
    texts = {n: _texts(group) for n, group in by_image.items()}

    def measure(seen: Encoded) -> list[_Answer]:
        return _answers(model, processor.tokenizer, seen, by_image[seen.number])

    return _summary(measure_by_image(model, processor, data, texts, batch_size, measure))


def _texts(foils: Sequence[Foil]) -> list[str]:
    """The true captions of an image, each once, and the wrong ones."""
    return [*dict.fromkeys(foil.caption for foil in foils), *(foil.wrong for foil in foils)]


def _answers(model, tokenizer, seen: Encoded, foils: list[Foil]) -> list[_Answer]:
    """Of one image, whose captions are its [`_texts`]."""
    image, text, index, rows = seen.image, seen.text, seen.image_row, seen.rows
    own = type(image)(**{name: values[index : index + 1] for name, values in image.items()})
    captions = type(text)(**{name: values[rows.start : rows.stop] for name, values in text.items()})
    scores = model.score(own, captions)[0].tolist()
    texts, answers, first_wrong = _texts(foils), [], len(rows) - len(foils)
    shares = []
    for caption, row in zip(texts, rows, strict=True):
        of_tokens = model.explain(image, text, index, row).patch_shares.sum(dim=1).cpu()
        words = words_of(caption, tokenizer)
        shares.append([(word, of_tokens[list(word.tokens)].sum().item()) for word in words])
    true = {caption: place for place, caption in enumerate(texts[:first_wrong])}
    for place, foil in enumerate(foils, start=first_wrong):
        of_true = true[foil.caption]
        is_found, chance = _lowest(shares[place], foil.spans)
        was_lowest, _ = _lowest(shares[of_true], foil.before)
        answers.append(_Answer(foil.image, foil.kind, scores[of_true] > scores[place], is_found, was_lowest, chance))
    return answers


def _lowest(shares: list[tuple[Word, float]], spans: Sequence[tuple[int, int]]) -> tuple[bool, float]:
    """Whether a word in the spans has the lowest share, of those and of content words, and by chance how often."""
    inside = {word for start, end in spans for word in words_within([word for word, _ in shares], start, end)}
    counted = [(word, share) for word, share in shares if word.is_content or word in inside]  # a number where it was edited
    if not counted:
        return False, 0.0
    least = min(share for _, share in counted)
    return all(word in inside for word, share in counted if share == least), len(inside) / len(counted)


def _summary(answers: list[_Answer]) -> dict[str, Any]:
    owners, kinds, *figures = (list(column) for column in zip(*answers, strict=True))
    of_scores, of_words, of_true, blind = (summarize_hits(np.array(values, float), owners, kinds) for values in figures)
    return {
        "foils": {
            kind: {
                **{"preferred": row.accuracy, "low": row.low, "high": row.high, "number": row.num_phrases},
                **{"found": of_words[kind].accuracy, "found_low": of_words[kind].low, "found_high": of_words[kind].high},
                **{"was_lowest": of_true[kind].accuracy, "chance": blind[kind].accuracy},
            }
            for kind, row in of_scores.items()
        }
    }


def foils_table(result: dict[str, Any]) -> str:
    """The figures as lines of text."""
    head = f"{'foils':<8}{'number':>8}{'true caption higher':>30}{'edited word lowest':>30}"
    lines = [f"{head}{'before the edit':>18}{'by chance':>12}"]
    for kind, row in result["foils"].items():
        preferred = f"{row['preferred']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        found = f"{row['found']:.1f} [{row['found_low']:.1f}, {row['found_high']:.1f}]"
        lines.append(
            f"{kind:<8}{row['number']:>8}{preferred:>30}{found:>30}{row['was_lowest']:>18.1f}{row['chance']:>12.1f}"
        )
    return "\n".join(lines)
