"""Two stages: candidates by a few vectors an item from an engine, then the exact score of each from its stored tokens."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from .candidates import search_vectors
from .engines import MOST_VECTORS_OF_A_GRAPH, Item
from .modeling.maps import word_maps
from .modeling.standard_errors import has_standard_errors, standard_errors
from .modeling.words import Word
from .storage import Storage
from .tokens import from_rows

Entry = tuple[float, int, Item]  # score, minus the place in the order of finding, item
BLOCK = 256  # items of a walk over all that are in memory at once
STEP_BYTES = 2**23  # of rows that become float32 at once: larger tensors are new memory each time, which takes longer
PREFETCH = 1000  # items by their pooled vector, where an item has too many vectors for a graph


@dataclass(frozen=True, eq=False)
class Result:
    """An item that was found.

    Attributes:
        id, payload: of the item.
        score: that of the model; without tokens, the mean over the query's vectors of the best product with one of the
            item's.
        standard_error: of the score under the noise of the regions; `None` without tokens or for models without it.
        is_in_answer_set: whether it is among the answers that hold the right one for 90 % of the queries, if the index is
            about as large as the gallery of the calibration; `None` if the model is not calibrated or there are no tokens.
        word_maps: on request, each word of the text and its map (rows, columns) on the patches of the image.
    """

    id: str
    score: float
    payload: dict[str, Any]
    standard_error: float | None = None
    is_in_answer_set: bool | None = None
    word_maps: list[tuple[str, Tensor]] | None = field(default=None, repr=False)


class TwoStages:
    """The search of an index."""

    def __init__(self, model, storage: Storage):
        self.model, self.engine, self.shards, self.settings = model, storage.engine, storage.shards, storage.settings
        self.has_captions = self.settings["contents"] == "captions"
        self.has_exact_scores = self.shards is not None or model.config.aligner == "vse++"

    def search(
        self, query: Any, top_k: int, where: dict | None, candidates: int, exact: bool, words: list[Word] | None
    ) -> list[Result]:
        """As `GranAlignIndex.search`, of the features of the query; `words`: those that maps are asked of."""
        if exact and not self.has_exact_scores:
            raise ValueError("`exact` needs tokens, and this index has none. Create it with `tokens`.")
        if words is not None and (self.shards is None or self.settings["max_patches"] is not None):
            raise ValueError("`has_word_maps` needs the tokens of all patches, which this index does not have.")
        best = self._best(query, self._found(query, where, max(candidates, top_k), exact), top_k)
        return self._results(query, best, words)

    def _found(self, query: Any, where: dict | None, candidates: int, exact: bool) -> Iterator[tuple[Item, float]]:
        """Items and their scores by the engine, which is 0 where all are scored anyway."""
        if exact and self.shards is not None:
            yield from ((item, 0.0) for item in self.engine.scan(where))
            return
        (matrix,) = search_vectors(self.model, query)
        limit = max(self.engine.count(), 1) if exact else candidates
        prefetch = max(PREFETCH, limit) if self.settings["num_vectors"] > MOST_VECTORS_OF_A_GRAPH else None
        for hit in self.engine.search("regions", matrix.float().cpu().numpy(), limit, where, prefetch):
            yield hit.item, hit.score

    def _best(self, query: Any, found: Iterator[tuple[Item, float]], top_k: int) -> list[Entry]:
        """The best by the exact score, a block of items at a time; of equal ones the first that were found."""
        best: list[Entry] = []
        order = itertools.count()
        while block := list(itertools.islice(found, BLOCK)):
            scores = [score for _, score in block]
            if self.shards is not None:
                scores = self._exact_scores(query, [item for item, _ in block])
            entries = [(score, -next(order), item) for score, (item, _) in zip(scores, block, strict=True)]
            best = heapq.nlargest(top_k, [*best, *entries])
        return best

    def _exact_scores(self, query: Any, items: list[Item]) -> list[float]:
        scores = np.empty(len(items))
        for numbers, features in self._stored(items, for_scores=True):
            scores[numbers] = self.model.score(*self._pair(query, features)).flatten().cpu().numpy()
        return scores.tolist()

    def _stored(self, items: list[Item], for_scores: bool = False) -> Iterator[tuple[list[int], Any]]:
        """Features of the items, as far as they were stored, a step at a time; and which of the items they are."""
        assert self.shards is not None
        for numbers, shard, rows in self.shards.read([item.place or () for item in items]):
            step = max(STEP_BYTES // shard.dtype.itemsize, 1)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                yield numbers[part], from_rows(shard, rows[part], self.model.device, for_scores=for_scores)

    def _pair(self, query: Any, stored: Any) -> tuple[Any, Any]:
        """Image side before text side."""
        return (query, stored) if self.has_captions else (stored, query)

    def _results(self, query: Any, best: list[Entry], words: list[Word] | None) -> list[Result]:
        results = [
            Result(item.id, score, item.payload, is_in_answer_set=self._is_in_answer_set(score, best[0][0]))
            for score, _, item in best
        ]
        has_errors = has_standard_errors(self.model.config)
        if self.shards is None or not (has_errors or words):
            return results
        for numbers, stored in self._stored([item for *_, item in best]):
            pair = self._pair(query, stored)
            errors = standard_errors(self.model, *pair).flatten().tolist() if has_errors else [None] * len(numbers)
            for row, (number, error) in enumerate(zip(numbers, errors, strict=True)):
                maps = None if words is None else self._word_maps(pair, row, words)
                results[number] = replace(results[number], standard_error=error, word_maps=maps)
        return results

    def _word_maps(self, pair: tuple[Any, Any], row: int, words: list[Word]) -> list[tuple[str, Tensor]]:
        tokens = word_maps(pair, image_index=row, level_weights=self.model.aligner.level_weights).cpu()
        return [(word.text, tokens[list(word.tokens)].mean(0)) for word in words]

    def _is_in_answer_set(self, score: float, highest: float) -> bool | None:
        thresholds = self.model.config.conformal_thresholds
        if thresholds is None or not self.has_exact_scores:
            return None
        return score >= highest - thresholds[0 if self.has_captions else 1]
