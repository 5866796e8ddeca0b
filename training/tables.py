"""Data sets by name: their splits, as tables or as streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets import (
    config as library,
)
from huggingface_hub.constants import HF_HUB_CACHE

from granalign_hf.training.arguments import RunArguments
from granalign_hf.training.columns import existing_column
from granalign_hf.training.scenes import scene_dataset

SPLIT_COLUMN = "split"
SCENE_SEEDS = {"train": 1, "validation": 2, "test": 4}


def load_table(name: str, split: str, config: str | None, split_column: str | None, num_scenes: int) -> Dataset:
    """A split as one table; arguments as `load_split`.

    Raises:
        ValueError: there is no such data set or split, or the split is empty.
    """
    if name == "scenes":
        _check_splits(name, split, SCENE_SEEDS)
        return scene_dataset(num_scenes, seed=SCENE_SEEDS[split])
    tables = _loaded(name, lambda: load_from_disk(name) if _is_saved(name) else load_dataset(name, config))
    tables = dict(tables) if isinstance(tables, DatasetDict) else {"train": tables}
    rows_of = _rows_by_column(tables, name, split_column)
    _check_splits(name, split, rows_of if split_column is not None else {**tables, **rows_of})
    (whole, *_) = tables.values()
    parts = [whole.select(rows_of[part]) if part in rows_of else tables[part] for part in split.split("+")]
    table = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if len(table) == 0:
        raise ValueError(f"The split {split!r} of the data set {name} is empty.")
    return table


def open_stream(name: str, split: str, config: str | None, split_column: str | None) -> tuple[IterableDataset, Features]:
    """A split that is read as it comes, its pictures as they are encoded, and the types of its columns.

    Raises:
        ValueError: there is no such data set, split or column, or nothing to stream.
    """
    if name == "scenes" or _is_saved(name):
        raise ValueError(
            f"`streaming` is for data sets that are read from files as they come; {name} lies ready: leave it out."
        )
    names = split_names(name, config)
    parts = [*names] if split_column is not None else split.split("+")
    _check_splits(name, "+".join(parts), names)
    streams = [_loaded(name, lambda part=part: load_dataset(name, config, split=part, streaming=True)) for part in parts]
    stream = streams[0] if len(streams) == 1 else concatenate_datasets(streams)
    features = stream.features or Dataset.from_list(list(stream.take(1))).features
    encoded = {n: Image(decode=False) if isinstance(kind, Image) else kind for n, kind in features.items()}
    stream = stream.cast(Features(encoded))
    if split_column is not None:
        existing_column("split", split_column, name, features)
        stream = stream.filter(partial(_is_one_of, splits=split.split("+")), input_columns=[split_column])
    return stream, features


def _is_one_of(value, splits: list[str]) -> bool:
    return str(value) in splits


def read_stream(name: str, split: str, config: str | None, split_column: str | None) -> Dataset:
    """A split of a stream as a table in memory, its pictures as they are encoded: what is evaluated must lie ready."""
    stream, features = open_stream(name, split, config, split_column)
    batches = [Dataset.from_dict(batch, features=features) for batch in stream.iter(batch_size=1000)]
    if not batches:
        raise ValueError(f"The split {split!r} of the data set {name} is empty.")
    return concatenate_datasets(batches)


def data_problems(run: RunArguments) -> list[str]:
    """What is wrong with the data set of a run and its splits. Only one that has a single table is loaded for that."""
    problems = []
    if run.image_folder is not None and not Path(run.image_folder).is_dir():
        problems.append(f"image_folder {run.image_folder} is no folder")
    name, options = run.dataset, (run.dataset_config, run.split_column)
    try:
        names: Iterable[str] = SCENE_SEEDS if name == "scenes" else split_names(name, run.dataset_config)
    except ValueError as error:
        return [*problems, str(error)]
    for field in ("train_split", "validation_split"):
        split = getattr(run, field)
        try:
            if len([*names]) > 1 and run.split_column is None:
                _check_splits(name, split, names)
            elif run.streaming:
                open_stream(name, split, *options)
            else:
                load_table(name, split, *options, num_scenes=1)
        except ValueError as error:
            problems.append(f"{field}: {error}")
    return problems


def split_names(name: str, config: str | None) -> list[str]:
    """The tables that a data set has; nothing of them is read."""
    if (Path(name) / "dataset_dict.json").is_file():
        return json.loads((Path(name) / "dataset_dict.json").read_text())["splits"]
    if _is_saved(name):
        return ["train"]
    builder = _loaded(name, lambda: load_dataset_builder(name, config))
    return [str(split) for split in builder.config.data_files or builder.info.splits or {}]


def picture_roots(name: str) -> tuple[str, ...]:
    """The folders that pictures of a data set may lie in: its own, and those that `datasets` unpacks and downloads to."""
    own = str(Path(name).resolve()) if Path(name).is_dir() else f"hf://datasets/{name}"
    return own, str(library.HF_DATASETS_CACHE), str(HF_HUB_CACHE)


def _is_saved(name: str) -> bool:
    return (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file()


def _loaded(name: str, load: Callable):
    """What `load()` gives.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        return load()
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"The data set {name!r} is neither a folder nor on the Hub: {error}") from error
    except Exception as error:  # whatever its readers raise of files that are broken, or of a script, which it does not run
        reason = error.__cause__ or error  # it hides what was wrong with a file
        raise ValueError(
            f"The data set {name!r} cannot be loaded: {reason} Name a copy in Parquet, or a folder of `save_to_disk`."
        ) from error


def _check_splits(name: str, split: str, known: Iterable[str]) -> None:
    """Raises ValueError unless each part of a split is known."""
    for part in split.split("+"):
        if part not in known:
            raise ValueError(
                f"The data set {name} has no split {part!r}; its splits are {sorted(known)}. Name one of them with `split` "
                "in evaluation, with `train_split` and `validation_split` in training."
            )


def _rows_by_column(tables: dict[str, Dataset], name: str, column: str | None) -> dict[str, list[int]]:
    """Split -> its rows, as a column of the only table says; nothing where there is no such column.

    Raises:
        ValueError: the column `column` was asked for and is not there, or there are several tables.
    """
    (table, *others) = tables.values()
    if column is not None:
        if others:
            raise ValueError(f"`split_column` is for a data set of one table; {name} has the splits {sorted(tables)}.")
        existing_column("split", column, name, table.features)
    elif others or SPLIT_COLUMN not in table.column_names or isinstance(table.features[SPLIT_COLUMN], Image):
        return {}
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(table[column or SPLIT_COLUMN]):
        rows.setdefault(str(value), []).append(row)
    return rows
