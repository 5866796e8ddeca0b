# Copyright 2026 The granalign authors. Licensed under the Apache License, Version 2.0.
"""Why a picture and a caption score what they score: shares of words and places that add up to the score, exactly.

A box is (x0, y0, x1, y1) in pixels, end exclusive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .modeling.alignment import (
    AlignedWord,
    Alignment,
    ReadCaption,
    SeenImage,
    align,
    align_words,
    grid_map,
    read_caption,
    saliency_map,
    see_image,
)
from .modeling.contributions import PairShares
from .modeling.maps import patch_box, picture_map, word_maps
from .modeling.words import FUNCTION_WORDS, Word, with_other_tokens, words_of

PLACE_KINDS = ("patch", "region", "prefix")


@dataclass(frozen=True)
class Place:
    """A patch, a region, or a token that stands before the patches (class and register tokens).

    Attributes:
        kind: "patch", "region" or "prefix". index: its number within its kind; of a patch row by row.
        box: of a patch, in pixels of the picture; `None` for the others.
    """

    kind: str
    index: int
    box: tuple[float, float, float, float] | None = field(default=None, repr=False)


class Contribution(NamedTuple):
    """One addend of a score.

    Attributes:
        direction: "t2i": the word looks for its place, in "i2t" the place for its word; "both": they meet in the pooled
            vectors of VSE++.
        level: "original", "key" or "uncertain" (GRM eq. 7); aligners of one level have the first alone.
    """

    word: AlignedWord
    place: Place
    level: str
    direction: str
    share: float


@dataclass(frozen=True, eq=False)
class Region:
    """A Gaussian of GRM's mixture, for one picture and one caption.

    Attributes:
        index: its number. weight: its mixing coefficient; those of all regions sum to 1.
        variance: the mean over features; `None` without uncertainty.
        map: (rows, columns), by how much each patch takes part in its mean.
        owns: (rows, columns) bool, the patches with more affinity to this region than to any other; of equal regions the
            first has them.
        share: what its level contributes to the score through it.
        words: content words (all, if none has content) by the cosine of their tokens with the mean, nearest first.
    """

    index: int
    weight: float
    variance: float | None
    map: Tensor = field(repr=False)
    owns: Tensor = field(repr=False)
    share: float
    words: list[tuple[AlignedWord, float]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Explanation(Alignment):
    """An alignment whose score is taken apart.

    Attributes:
        tokens: the words and, as words of their own, special tokens such as [CLS]: all that takes part in the score.
        contributions: shares that add up to the score, the largest magnitude first; pieces of a word are merged.
        share_maps: (tokens, rows, columns), the shares of each of `tokens` by patch, in all levels and directions; what a
            region contributes is spread over the patches that it is the mean of.
        prefix_shares: (tokens,), the same for class and register tokens, so that both add up to the score.
        regions: GRM's, none for other aligners.
    """

    tokens: list[AlignedWord]
    contributions: list[Contribution] = field(repr=False)
    share_maps: Tensor = field(repr=False)
    prefix_shares: Tensor = field(repr=False)
    regions: list[Region]

    @property
    def share_map(self) -> Tensor:
        """(rows, columns): how much of the score lies in each patch."""
        return self.share_maps.sum(0)

    @property
    def region_owners(self) -> Tensor | None:
        """(rows, columns): the number of the region that owns each patch; `None` without regions."""
        return torch.stack([region.owns for region in self.regions]).int().argmax(0) if self.regions else None

    @property
    def word_shares(self) -> list[tuple[AlignedWord, float]]:
        """What each word and special token contributes to the score, in the order of the caption."""
        shares = dict(_summed((c.word, c.share) for c in self.contributions))
        return [(word, shares.get(word, 0.0)) for word in self.tokens]

    def top_places(self, word: Word, kind: str | None = None) -> list[tuple[Place, float]]:
        """One word to many places: all that share with it, the largest share first. `kind` as in [`Place`]: only those.

        Raises:
            ValueError: the word is none of `tokens`, or there is no such kind.
        """
        if not isinstance(word, Word) or (word.text, word.tokens) not in [(own.text, own.tokens) for own in self.tokens]:
            raise ValueError(f"`word` must be one of the `tokens` of this explanation, got {word!r}.")
        if kind not in (None, *PLACE_KINDS):
            raise ValueError(f"`kind` must be one of {', '.join(PLACE_KINDS)}, got {kind!r}.")
        mine = (c for c in self.contributions if c.word.tokens == word.tokens)
        return _summed((c.place, c.share) for c in mine if kind in (None, c.place.kind))

    def top_words(self, place: Place) -> list[tuple[AlignedWord, float]]:
        """One place to many words: all that share with it, the largest share first; none, where nothing does.

        Raises:
            ValueError: `place` is no [`Place`].
        """
        if not isinstance(place, Place):
            raise ValueError(f"`place` must be a Place, as contributions have one, got {place!r}.")
        return _summed((c.word, c.share) for c in self.contributions if c.place == place)


class Difference(NamedTuple):
    """What one word at one place contributes to either score; 0 to that which does not have it."""

    word: AlignedWord
    place: Place
    level: str
    direction: str
    first: float
    second: float

    @property
    def share(self) -> float:
        return self.first - self.second


@dataclass(frozen=True, eq=False)
class Comparison:
    """Why one pair ranks above another.

    Attributes:
        differences: they add up to `first.score - second.score`, the largest magnitude first.
        words: text of each word and special token, and its shares of the first and the second score, likewise.
    """

    first: Explanation
    second: Explanation
    differences: list[Difference] = field(repr=False)
    words: list[tuple[str, float, float]]

    @property
    def score(self) -> float:
        return self.first.score - self.second.score


def explain(model, processor, image: Any, caption: str) -> Explanation:
    r"""
    Take the score of one picture and one caption apart, with any aligner.

    Args and errors as in [`align`].

    Example:

    ```python
    >>> from granalign_hf.explanation import explain

    >>> explanation = explain(model, processor, "dog.jpg", "a dog catches a red ball")
    >>> [(word.text, round(share, 3)) for word, share in explanation.word_shares]
    [('[CLS]', 0.021), ('a', 0.034), ('dog', 0.097), ...]
    >>> explanation.top_places(explanation.content_words[0])[0]
    (Place(kind='patch', index=87), 0.031)
    ```
    """
    return _explain(model, processor, see_image(model, processor, image), read_caption(model, processor, caption))


def explain_ranking(model, processor, images: Sequence[Any], captions: Sequence[str]) -> list[Explanation]:
    """Every picture with every caption, the best first: one picture and several captions, or the other way round.

    Args and errors as in [`align`], which takes one of each.
    """
    if isinstance(captions, str) or not isinstance(images, list | tuple):
        raise ValueError("`images` and `captions` must be lists, where one of them may have a single entry.")
    seen = [see_image(model, processor, image) for image in images]
    read = [read_caption(model, processor, caption) for caption in captions]
    pairs = [_explain(model, processor, one_image, one_caption) for one_image in seen for one_caption in read]
    return sorted(pairs, key=lambda explanation: explanation.score, reverse=True)


def compare(first: Explanation, second: Explanation) -> Comparison:
    """Why `first` ranks above `second`: two captions of one picture, or two pictures with one caption.

    Words are the same if they are spelt alike (the second "dog" of a caption is that of the other), places if they lie in
    the same picture.

    Raises:
        ValueError: neither the picture nor the caption is the same.
    """
    is_same_picture = first.image == second.image
    if not is_same_picture and first.caption != second.caption:
        raise ValueError(
            "`first` and `second` must share the picture or the caption, got two pictures and the captions "
            f"{first.caption!r} and {second.caption!r}."
        )
    entries: dict[tuple, Difference] = {}
    words: dict[tuple[str, int], tuple[str, float, float]] = {}
    for side, explanation in enumerate((first, second)):
        names = _spellings(explanation.tokens)
        for word, place, level, direction, share in explanation.contributions:
            key = (names[word], place if is_same_picture else (side, place), level, direction)
            entry = entries.get(key, Difference(word, place, level, direction, 0.0, 0.0))
            entries[key] = entry._replace(first=share) if side == 0 else entry._replace(second=share)
        for word, share in explanation.word_shares:
            text, of_first, of_second = words.get(names[word], (word.text, 0.0, 0.0))
            words[names[word]] = (text, share, of_second) if side == 0 else (text, of_first, share)
    differences = sorted(entries.values(), key=lambda entry: -abs(entry.share))
    by_word = sorted(words.values(), key=lambda entry: -abs(entry[1] - entry[2]))
    return Comparison(first, second, differences, by_word)


_Key = TypeVar("_Key")


def _summed(shares: Iterable[tuple[_Key, float]]) -> list[tuple[_Key, float]]:
    """The sum of each key, the largest first."""
    sums: dict[_Key, float] = {}
    for key, share in shares:
        sums[key] = sums.get(key, 0.0) + share
    return sorted(sums.items(), key=lambda item: -item[1])


def _spellings(words: Sequence[Word]) -> dict[Word, tuple[str, int]]:
    """Each word as its spelling in small letters and the number of the same before it."""
    seen: Counter[str] = Counter()
    spellings = {}
    for word in words:
        text = word.text.lower()
        spellings[word] = (text, seen[text])
        seen[text] += 1
    return spellings


def _explain(model, processor, seen: SeenImage, read: ReadCaption) -> Explanation:
    is_token = read.features.word_mask[0].tolist()
    own = with_other_tokens(read.words, read.caption, read.offsets, read.input_ids, is_token, processor.tokenizer)
    tokens = align_words(model, seen, read, own)
    of_caption = {word.tokens for word in read.words}
    words = [word for word in tokens if word.tokens in of_caption]
    shares = model.explain(seen.features, read.features)
    members = torch.zeros(len(tokens), len(is_token), dtype=torch.float64)
    for row, word in enumerate(tokens):
        members[row, list(word.tokens)] = 1
    contributions = _contributions(shares, members, tokens, _patch_places(seen))
    by_patch = (members @ shares.patch_shares.cpu().double()).T  # (Lv, tokens)
    on_grid = grid_map(seen, by_patch)
    return Explanation(
        image=seen.picture,
        caption=read.caption,
        score=shares.score,
        words=words,
        patch_saliency=saliency_map(seen),
        area=seen.area,
        tokens=tokens,
        contributions=contributions,
        share_maps=on_grid.permute(2, 0, 1),
        prefix_shares=by_patch.sum(0).float() - on_grid.sum((0, 1)),
        regions=_regions(seen, read, words, contributions),
    )


def _patch_places(seen: SeenImage) -> dict[int, Place]:
    """The place of every patch token, by its position."""
    rows, columns = seen.features.spatial_shapes[0].tolist()
    positions = seen.features.patch_mask[0].nonzero()[:, 0].tolist()
    num_prefix = len(positions) - rows * columns
    places = {position: Place("prefix", index) for index, position in enumerate(positions[:num_prefix])}
    for index, position in enumerate(positions[num_prefix:]):
        row, column = divmod(index, columns)
        box = patch_box(row, column, (rows, columns), seen.area, seen.picture.size)
        places[position] = Place("patch", index, box)
    return places


def _contributions(
    shares: PairShares, members: Tensor, tokens: list[AlignedWord], patches: dict[int, Place]
) -> list[Contribution]:
    """The shares of word tokens, summed over the tokens of each word; members: (words, Lt), 1 = token of the word."""
    found = []
    for part in shares.parts:
        merged = members @ part.shares.cpu().double()
        for row, position in merged.nonzero().tolist():
            place = patches[position] if part.kind == "patch" else Place("region", position)
            found.append(Contribution(tokens[row], place, part.level, part.direction, merged[row, position].item()))
    return sorted(found, key=lambda contribution: -abs(contribution.share))


def _regions(
    seen: SeenImage, read: ReadCaption, words: list[AlignedWord], contributions: list[Contribution]
) -> list[Region]:
    image = seen.features
    if image.region_means is None:
        return []
    maps = grid_map(seen, image.region_assignment[0])
    owner = grid_map(seen, image.region_affinity[0]).argmax(-1)
    means = torch.nn.functional.normalize(image.region_means[0].float(), dim=-1)
    cosines = (read.features.word_embeds[0].float() @ means.T).cpu()
    content = [word for word in words if word.is_content] or words
    shares = dict(_summed((c.place.index, c.share) for c in contributions if c.place.kind == "region"))
    log_vars = image.region_log_vars
    regions = []
    for k in range(maps.shape[-1]):
        near = [(word, cosines[list(word.tokens), k].mean().item()) for word in content]
        regions.append(
            Region(
                index=k,
                weight=image.region_weights[0, k].item(),
                variance=None if log_vars is None else log_vars[0, k].float().exp().mean().item(),
                map=maps[..., k],
                owns=owner == k,
                share=shares.get(k, 0.0),
                words=sorted(near, key=lambda item: -item[1]),
            )
        )
    return regions


__all__ = [
    "FUNCTION_WORDS",
    "AlignedWord",
    "Alignment",
    "Comparison",
    "Contribution",
    "Difference",
    "Explanation",
    "Place",
    "Region",
    "Word",
    "align",
    "compare",
    "explain",
    "explain_ranking",
    "patch_box",
    "picture_map",
    "word_maps",
    "words_of",
]
