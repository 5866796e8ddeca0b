"""Where an index is: a folder with an engine, shards of tokens and a lock, or a collection on a server.

A folder has `index.json` (what the index was built with), `engine/`, `tokens/` and `write.lock`. The engine holds the list
of what is in; tokens reach the disk before the engine is told of them, so that a process that is killed leaves at worst
tokens that no item points to.
"""

from __future__ import annotations

import importlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .engines import Engine
from .engines.brute_force import BruteForce
from .shards import TokenShards
from .whole_files import UNFINISHED, write_whole

OWN_NAMES = {f"index.json{UNFINISHED}", "engine", "tokens", "write.lock"}  # of an index that was killed as it was made
ENGINES = ("edge", "torch")  # of a folder
EXTRAS = {"edge": "index", "server": "server"}  # what to install


@dataclass
class Storage:
    """An engine, the shards where there are tokens, what the index was built with, and the lock of a writer."""

    path: str
    settings: dict[str, Any]
    engine: Engine
    shards: TokenShards | None
    lock: FileLock | None
    is_writer: bool

    def close(self) -> None:
        self.engine.close()
        if self.lock is not None:
            self.lock.release()


def create_storage(
    path_or_url: str | Path, settings: dict[str, Any], token_folder: Path | None, options: dict[str, Any]
) -> Storage:
    """An empty index, open for writing.

    Args:
        settings: `engine`, `dim`, `num_vectors`, `tokens`, and whatever else the index was built with.
        options: of `QdrantClient.create_collection`.

    Raises:
        ValueError: there is an index already, or something else, or `options` without a server; the token folder has the
            tokens of another index.
        BlockingIOError: another process writes there.
        ImportError: the engine is not installed.
    """
    path = str(path_or_url)
    if is_url(path):
        place = _place_of_new_tokens(path, settings, token_folder)  # before there is a collection
        server = _engine_module("server")
        client, collection = server.connect(path)
        server.create_collection(client, collection, settings["dim"], settings["num_vectors"], settings, **options)
        _claim(place, settings)
        return _with_tokens(path, settings, server.Server(client, collection, settings["dim"]), place, True)
    if options:
        raise ValueError(f"{sorted(options)} are options of a collection on a server, but {path!r} is a folder.")
    folder = Path(path)
    if (folder / "index.json").is_file():
        raise ValueError(f"{path} is an index already. Open it with `GranAlignIndex.open`, or choose another folder.")
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} - OWN_NAMES:
        raise ValueError(f"{path} has other things in it. Choose a new folder for the index.")
    place = _place_of_new_tokens(path, settings, token_folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    _claim(place, settings)
    storage = _open_folder(folder, settings, place, lock)
    write_whole(folder / "index.json", json.dumps(settings, indent=2) + "\n")
    return storage


def open_storage(path_or_url: str | Path, mode: str, token_folder: Path | None) -> Storage:
    """
    Args:
        mode: "r" reads, any number of processes may; "a" adds and changes, one process may.

    Raises:
        ValueError: another `mode`, there is no index, or its tokens are elsewhere.
        BlockingIOError: another process writes there.
        ImportError: the engine is not installed.
    """
    if mode not in ("r", "a"):
        raise ValueError(f'`mode` must be "r" (read) or "a" (add and change), got {mode!r}.')
    path = str(path_or_url)
    settings = read_settings(path)
    place = _place_of_own_tokens(path, settings, token_folder)
    if is_url(path):
        server = _engine_module("server")
        engine = server.Server(*server.connect(path), settings["dim"])
        return _with_tokens(path, settings, engine, place, mode == "a")
    folder = Path(path)
    if mode == "a":
        return _open_folder(folder, settings, place, _lock(folder))
    _publish_what_was_left(folder, settings)
    return _open_folder(folder, settings, place, None)


def checkpoint_of(path_or_url: str | Path) -> str:
    """Where the model was that an index was built with.

    Raises:
        ValueError: there is no index, or its model had never been saved or is where it was no more.
    """
    checkpoint = read_settings(str(path_or_url))["checkpoint"]
    if checkpoint is None:
        raise ValueError(f"{path_or_url} was built with a model that was not saved then. Name its checkpoint.")
    if Path(checkpoint).is_absolute() and not Path(checkpoint).is_dir():
        raise ValueError(f"{path_or_url} was built with {checkpoint}, which is no more. Name where its checkpoint is now.")
    return checkpoint


def read_settings(path: str) -> dict[str, Any]:
    """What an index was built with. Raises ValueError: there is no index."""
    if is_url(path):
        server = _engine_module("server")
        settings = server.collection_settings(*server.connect(path)) or {}
    else:
        file = Path(path) / "index.json"
        try:
            settings = json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is broken ({error}). Build the index anew.") from error
    if "fingerprint" not in settings:
        raise ValueError(f"There is no index in {path}. Make one with `GranAlignIndex.create` or `granalign index`.")
    return settings


def is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _lock(folder: Path) -> FileLock:
    """Held until it is released or the process ends, however it ends."""
    lock = FileLock(folder / "write.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f'{folder} is open for writing elsewhere; one writer at a time is possible. Wait, or open it with mode="r".'
        ) from None
    return lock


def _open_folder(folder: Path, settings: dict[str, Any], place: Path | None, lock: FileLock | None) -> Storage:
    engine = _folder_engine(folder / "engine", settings, lock is not None)
    shards = None if place is None else TokenShards(place, lock is not None)
    return Storage(str(folder), settings, engine, shards, lock, lock is not None)


def _folder_engine(folder: Path, settings: dict[str, Any], is_writer: bool) -> Engine:
    if settings["engine"] == "torch":
        return BruteForce(folder, settings["dim"])
    return _engine_module("edge").Edge(folder, settings["dim"], settings["num_vectors"], is_writer)


def _publish_what_was_left(folder: Path, settings: dict[str, Any]) -> None:
    """A writer that was killed has not published what it committed: done here, unless another one is at work."""
    if settings["engine"] != "edge" or not _engine_module("edge").is_unpublished(folder / "engine"):
        return
    with suppress(BlockingIOError, PermissionError):
        lock = _lock(folder)
        try:
            _folder_engine(folder / "engine", settings, is_writer=True).close()
        finally:
            lock.release()


def _with_tokens(path: str, settings: dict[str, Any], engine: Engine, place: Path | None, is_writer: bool) -> Storage:
    if place is None:
        return Storage(path, settings, engine, None, None, is_writer)
    lock = _lock(place) if is_writer else None
    return Storage(path, settings, engine, TokenShards(place, is_writer), lock, is_writer)


def _token_place(path: str, settings: dict[str, Any], token_folder: Path | None) -> Path | None:
    """The folder of the tokens, if there are any."""
    if not settings["tokens"]:
        return None
    if token_folder is None and is_url(path):
        raise ValueError(f"The tokens of {path} are in a folder: name it as `token_folder`.")
    return token_folder or Path(path) / "tokens"


def _place_of_new_tokens(path: str, settings: dict[str, Any], token_folder: Path | None) -> Path | None:
    place = _token_place(path, settings, token_folder)
    if place is not None and any(place.glob("*.bin")):
        raise ValueError(f"{place} has the tokens of another index. Name a new folder as `token_folder`.")
    return place


def _place_of_own_tokens(path: str, settings: dict[str, Any], token_folder: Path | None) -> Path | None:
    place = _token_place(path, settings, token_folder)
    if place is not None and not (_owner(place).is_file() and _owner(place).read_text() == settings.get("id")):
        raise ValueError(f"The tokens of {path} are not in {place}. Name the folder that they are in as `token_folder`.")
    return place


def _claim(place: Path | None, settings: dict[str, Any]) -> None:
    """The folder belongs to the tokens of this index from now on."""
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        _owner(place).write_text(settings["id"])


def _owner(place: Path) -> Path:
    """The file that says whose tokens are in a folder."""
    return place / "index.id"


def _engine_module(name: str) -> Any:
    try:
        return importlib.import_module(f"granalign_hf.engines.{name}")
    except ModuleNotFoundError as error:
        hint = ', or create the index with engine="torch"' if name == "edge" else ""
        raise ImportError(f"{error.name} is missing: pip install 'granalign-hf[{EXTRAS[name]}]'{hint}.") from error
