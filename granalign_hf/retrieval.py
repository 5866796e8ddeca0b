"""The search index: candidates by a few vectors an item from an engine, then the exact score of each from its tokens."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .candidates import ItemEncoder, num_search_vectors
from .engines import Item
from .fingerprints import fingerprint
from .modeling.alignment import read_caption
from .storage import ENGINES, Storage, create_storage, is_url, open_storage
from .tokens import TokenFormat, to_rows
from .two_stages import Result, TwoStages

IDS_AT_ONCE = 1000
DEFAULT_TOKENS = "int8"  # on Flickr8k it loses nothing against float16 and takes two thirds of the bytes, see EXPERIMENTS.md


@dataclass
class Added:
    """What became of items: how many were added, how many were in already, and why the others were refused, by id."""

    num_added: int = 0
    num_skipped: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class GranAlignIndex:
    r"""
    Pictures searched with a sentence, or sentences searched with a picture, by a [`GranAlignModel`].

    Made by [`~GranAlignIndex.create`] or [`~GranAlignIndex.open`], and closed by `close()` or the end of a `with` block:

    ```python
    >>> from granalign_hf.retrieval import GranAlignIndex

    >>> with GranAlignIndex.create("my.index", model, processor) as index:
    ...     index.add(["dog.jpg", "cat.jpg"])
    >>> with GranAlignIndex.open("my.index", model, processor) as index:
    ...     [(result.id, result.score) for result in index.search(text="a dog on a beach", top_k=1)]
    [('dog.jpg', 0.83...)]
    ```

    One process may write while others read. Readers see what was there when the writer last published: it does when it
    closes, and at `publish()`.
    """

    def __init__(self, model, processor, storage: Storage):
        self.model, self.processor, self.storage = model, processor, storage
        self.engine, self.shards, self.settings = storage.engine, storage.shards, storage.settings
        self.has_captions = self.settings["contents"] == "captions"
        self.form = TokenFormat(self.settings["tokens"] or DEFAULT_TOKENS, self.settings["max_patches"])
        self.encoder = ItemEncoder(model, processor, has_captions=self.has_captions)
        self.queries = ItemEncoder(model, processor, has_captions=not self.has_captions)
        self.stages = TwoStages(model, storage)

    # ----------------------------------------------------------------------------------------------------- life of an index

    @classmethod
    def create(
        cls,
        path_or_url: str | Path,
        model,
        processor,
        *,
        contents: str = "images",
        engine: str = "edge",
        tokens: str | None = "auto",
        max_patches: int | None = None,
        token_folder: str | Path | None = None,
        **collection_options: Any,
    ) -> GranAlignIndex:
        """An empty index, open for writing.

        Args:
            path_or_url: a new folder, or `http://HOST:PORT/COLLECTION` of a Qdrant server.
            model: in evaluation mode. processor: its own.
            contents: "images" or "captions".
            engine: of a folder: "edge" (Qdrant Edge), or "torch", which compares with every item and needs nothing else.
            tokens: "int8" or "float16", in which the tokens of an item are stored; `None`: candidates are final.
                "auto": "int8", but `None` for VSE++, whose one vector an item gives the exact score, and for a server
                without `token_folder`.
            max_patches: of each image only so many patches are stored, the most salient ones (GRM).
            token_folder: where tokens are stored. Default: in the folder of the index.
            collection_options: `shard_number`, `replication_factor` and others of `QdrantClient.create_collection`.

        Raises:
            ValueError: a value is none of these, or there is an index already.
            BlockingIOError: another process writes there.
            ImportError: the engine is not installed.
        """
        _check_model(model)
        if contents not in ("images", "captions"):
            raise ValueError(f'`contents` must be "images" or "captions", got {contents!r}.')
        if engine not in ENGINES:
            raise ValueError(f"`engine` must be one of {ENGINES}, got {engine!r}.")
        has_no_place = is_url(str(path_or_url)) and token_folder is None
        if tokens == "auto":
            tokens = None if has_no_place or model.config.aligner == "vse++" else DEFAULT_TOKENS
        form = TokenFormat(tokens or DEFAULT_TOKENS, max_patches)
        if max_patches is not None and (model.config.aligner != "grm" or contents != "images"):
            raise ValueError('`max_patches` keeps the most salient patches of images, which only the aligner "grm" knows.')
        settings = {
            "version": 1,
            "id": uuid.uuid4().hex,
            "contents": contents,
            "engine": "server" if is_url(str(path_or_url)) else engine,
            "tokens": tokens,
            "max_patches": form.max_patches,
            "dim": model.config.projection_dim,
            "num_vectors": num_search_vectors(model.config, contents),
            "checkpoint": _checkpoint(model),
            "fingerprint": fingerprint(model, processor),
        }
        place = None if token_folder is None else Path(token_folder)
        return cls(model, processor, create_storage(path_or_url, settings, place, collection_options))

    @classmethod
    def open(
        cls, path_or_url: str | Path, model, processor, mode: str = "r", *, token_folder: str | Path | None = None
    ) -> GranAlignIndex:
        """An index that was created before.

        Args:
            mode: "r" reads, in any number of processes; "a" adds and changes, in one.

        Raises:
            ValueError: there is no index, it was built with another model or preprocessing, or its tokens are elsewhere.
            BlockingIOError: another process writes there (mode "a").
        """
        _check_model(model)
        storage = open_storage(path_or_url, mode, None if token_folder is None else Path(token_folder))
        own, given = storage.settings["fingerprint"], fingerprint(model, processor)
        others = [name for name in own if own[name] != given.get(name)]
        if others:
            storage.close()
            raise ValueError(
                f"{path_or_url} was built with another model: {', '.join(others)} differ. Open it with the checkpoint that "
                "it was built with, or build it anew."
            )
        return cls(model, processor, storage)

    def publish(self) -> None:
        """Readers that open the index from now on see what was written so far; for a writer."""
        self._check_writer()
        self.engine.publish()

    def close(self) -> None:
        self.storage.close()

    def __enter__(self) -> GranAlignIndex:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return self.engine.count()

    # -------------------------------------------------------------------------------------------------------------- writing

    def add(
        self,
        items: Sequence,
        ids: Sequence[str] | None = None,
        payloads: Sequence[dict] | None = None,
        *,
        batch_size: int = 32,
        is_quiet: bool = False,
    ) -> Added:
        """Adds pictures or captions; those whose id is in already are skipped, so that an interrupted run can be repeated.

        After each batch what it added is kept, whatever happens to the process. What cannot be read is reported, the rest
        of its batch is added.

        Args:
            items: pictures (paths, PIL images, a column of a data set, features of regions) or captions.
            ids: texts. Default: the paths, or the captions.
            payloads: dictionaries that JSON can hold.
            batch_size: items in a step of the encoder.
            is_quiet: no progress bar.

        Raises:
            ValueError: lengths differ, `ids` are missing, `batch_size` is below 1, or the index is open for reading only.
        """
        self._check_writer()
        ids = _ids_of(items) if ids is None else list(ids)
        payloads = [{}] * len(ids) if payloads is None else payloads
        _check_batches(items, ids, payloads, batch_size)
        added = Added()
        seen: set[str] = set()
        with tqdm(total=len(ids), desc=self.settings["contents"], disable=is_quiet) as progress:
            for start in range(0, len(ids), batch_size):
                numbers = range(start, min(start + batch_size, len(ids)))
                known = {item.id for item in self.engine.get([ids[n] for n in numbers if _is_id(ids[n])])} - seen
                new = [(ids[n], payloads[n], n) for n in numbers if not (_is_id(ids[n]) and ids[n] in known)]
                added.num_skipped += len(numbers) - len(new)
                self._write(added, seen, new, items)
                progress.update(len(numbers))
        return added

    def update(
        self, items: Sequence, ids: Sequence[str], payloads: Sequence[dict] | None = None, *, batch_size: int = 32
    ) -> Added:
        """Replaces items that are in. Arguments as in [`~GranAlignIndex.add`]; without `payloads` the old ones stay.

        `refused` names those that are not in, too.
        """
        self._check_writer()
        _check_batches(items, ids, ids if payloads is None else payloads, batch_size)
        old = self.get(ids)
        added = Added()
        seen: set[str] = set()
        wanted = [(id, old[id] if payloads is None else payloads[n], n) for n, id in enumerate(ids) if id in old]
        added.refused = {id: "it is not in the index; use `add`" for id in ids if id not in old}
        for start in range(0, len(wanted), batch_size):
            self._write(added, seen, wanted[start : start + batch_size], items)
        return added

    def delete(self, ids: Sequence[str]) -> int:
        """Forgets items; ids that are not in do no harm. Returns how many were in. Their tokens stay on the disk unread."""
        self._check_writer()
        found = list(self.get(ids))
        self.engine.delete(found)
        self.engine.commit()
        return len(found)

    def _write(self, added: Added, seen: set[str], wanted: list[tuple[str, Any, int]], things: Sequence) -> None:
        """One batch: read, encode, store."""
        read, kept = [], []
        for id, payload, number in wanted:
            try:
                kept.append(_checked(id, payload, seen))
                read.append(self.encoder.read(things, number))
            except Exception as error:  # a picture of a data set is decoded here, and decoders raise whatever comes
                del kept[len(read) :]
                added.refused.setdefault(str(id), str(error))
            else:
                seen.add(id)
        if read:
            self._store(added, kept, read)

    def _store(self, added: Added, kept: list[tuple[str, dict]], read: list) -> None:
        """Items that were read; where the model refuses one of them, each by itself."""
        try:
            self.add_features(self.encoder.features(read), *zip(*kept, strict=True))
        except ValueError as error:
            if len(read) == 1:
                added.refused[kept[0][0]] = str(error)
                return
            for item, thing in zip(kept, read, strict=True):
                self._store(added, [item], [thing])
        else:
            added.num_added += len(kept)

    def add_features(self, features: Any, ids: Sequence[str], payloads: Sequence[dict]) -> None:
        """Adds, or replaces, what the model has said of pictures or captions, without a look at what is in.

        Tokens first, then the engine: what is in has its tokens.

        Args:
            features: an output of `get_image_features` or `get_text_features`, a row an id.
        """
        self._check_writer()
        places: Sequence = [None] * len(ids)
        if self.shards is not None:
            places = self.shards.append(to_rows(features, self.form))
        items = [Item(*one) for one in zip(ids, payloads, places, strict=True)]
        self.engine.upsert(self.encoder.points(features, items))
        self.engine.commit()

    def _check_writer(self) -> None:
        if not self.storage.is_writer:
            raise io.UnsupportedOperation(f'{self.storage.path} is open for reading. Open it with mode="a" to change it.')

    # ------------------------------------------------------------------------------------------------------------ searching

    @torch.no_grad()
    def search(
        self,
        text: str | None = None,
        image: Any = None,
        top_k: int = 10,
        where: dict[str, Any] | None = None,
        *,
        candidates: int = 100,
        exact: bool = False,
        has_word_maps: bool = False,
    ) -> list[Result]:
        """The best items, best first.

        Args:
            text: a sentence, for an index of images. image: a picture, for one of captions.
            where: only items whose payload has these values; a list stands for any of its values.
            candidates: how many items of the engine get an exact score.
            exact: all items get one. The time grows with the index.
            has_word_maps: the results have the maps of the words.

        Raises:
            ValueError: not the query that the index takes, a filter that is none, or something asked for that needs tokens
                where there are none.
        """
        if min(top_k, candidates) < 1:
            raise ValueError(f"`top_k` and `candidates` must be at least 1, got {top_k} and {candidates}.")
        query = self._query(text, image)
        words = None
        if has_word_maps:
            if text is None:
                raise ValueError("`has_word_maps` needs `text`: the maps are those of its words.")
            words = read_caption(self.model, self.processor, text).words
        return self.stages.search(query, top_k, where, candidates, exact, words)

    def _query(self, text: str | None, image: Any) -> Any:
        wanted, other = ("image", "text") if self.has_captions else ("text", "image")
        given = {"text": text, "image": image}
        if given[wanted] is None or given[other] is not None:
            raise ValueError(f"An index of {self.settings['contents']} is searched with `{wanted}`, and with it alone.")
        return self.queries.features([self.queries.read([given[wanted]], 0)])

    # ----------------------------------------------------------------------------------------------------------- inspecting

    def get(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The payloads of those ids that are in."""
        if isinstance(ids, str):
            raise ValueError(f"`ids` must be a list of texts, got {ids!r}.")
        wanted = [id for id in ids if _is_id(id)]
        parts = (wanted[start : start + IDS_AT_ONCE] for start in range(0, len(wanted), IDS_AT_ONCE))
        return {item.id: item.payload for part in parts for item in self.engine.get(part)}

    def stats(self) -> dict[str, Any]:
        """Number of items, what is stored of them, and the bytes of their tokens."""
        kept = ("contents", "engine", "tokens", "max_patches", "num_vectors", "dim")
        num_items, num_bytes = len(self), 0 if self.shards is None else self.shards.num_bytes()
        vectors = 2 * self.settings["dim"] * (self.settings["num_vectors"] + 1)
        sizes = {
            "token_bytes": num_bytes,
            "token_bytes_an_item": num_bytes / max(num_items, 1),
            "vector_bytes_an_item": vectors,
        }
        return {"num_items": num_items, **{name: self.settings[name] for name in kept}, **sizes}

    def verify(self) -> list[str]:
        """Reads everything: the ids of items whose tokens are missing or not what was written."""
        if self.shards is None:
            return []
        return [item.id for item in self.engine.scan() if item.place is None or not self.shards.is_whole(item.place)]


def _check_model(model) -> None:
    if model.training:
        raise ValueError("`model` is in training mode, where scores are drawn at random. Call `model.eval()` first.")


def _checkpoint(model) -> str | None:
    """Where the model came from: a folder, whatever the working directory is, or a name on the Hub."""
    path = Path(model.name_or_path or "")
    return str(path.resolve()) if model.name_or_path and path.is_dir() else model.name_or_path or None


def _ids_of(things: Sequence) -> list[str]:
    if not isinstance(things, list | tuple) or not all(isinstance(thing, str | Path) for thing in things):
        raise ValueError("`ids` must be given where the items are neither paths nor captions.")
    return [str(thing) for thing in things]


def _check_batches(items: Sequence, ids: Sequence, payloads: Sequence, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not len(items) == len(ids) == len(payloads):
        lengths = f"{len(items)}, {len(ids)} and {len(payloads)}"
        raise ValueError(f"`items`, `ids` and `payloads` must have the same length, got {lengths}.")


def _is_id(id: Any) -> bool:
    """A text; file names that are not UTF-8 come with surrogates, which no engine takes."""
    return isinstance(id, str) and bool(id) and not any("\ud800" <= letter <= "\udfff" for letter in id)


def _checked(id: Any, payload: Any, seen: set[str]) -> tuple[str, dict]:
    """An id and a payload as JSON has it."""
    if not _is_id(id):
        raise ValueError(f"its id must be a text that is not empty and that UTF-8 can hold, got {id!r}")
    if id in seen:
        raise ValueError("its id came before; the first one counts")
    if not isinstance(payload, dict):
        raise ValueError(f"its payload must be a dictionary, got {type(payload).__name__}")
    try:
        text = json.dumps(payload, allow_nan=False, ensure_ascii=False)
        return id, json.loads(text.encode())
    except (TypeError, ValueError) as error:
        raise ValueError(f"its payload must be what JSON can hold, got {payload!r:.80}: {error}") from error
