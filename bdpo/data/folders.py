"""Data sets that are more than one file: folders of data files, and what the library `datasets` reads.

Which files of a folder make a split is decided as `datasets.load_dataset` decides it. Our own readers read
them, so that each row is read, counted and named as one of a single file is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from bdpo.config.data import SourceConfig
from bdpo.data.containers import ARROW_ROWS, NumberedRow, Read, Unreadable, arrow_rows, kind_of
from bdpo.errors import UserError, escaped, first_line

# In what the library says where no configuration is named, or one that is not there.
_CONFIGURATIONS = re.compile(r"(?:among the available configs|Available): \[(.*?)\]")

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

_OTHER_ROWS = {".tsv", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".zip", ".tar"}

_INFOS = {"dataset_info.json", "dataset_infos.json"}  # of the library itself


@dataclass(frozen=True)
class DataFiles:
    """The data files of a split of a folder, in order; `others` are data files that belong to no split."""

    files: list[Path]
    others: list[Path]


def data_files(folder: Path, config: SourceConfig, name: str) -> DataFiles | None:
    """The data files of a folder; None if only `datasets` can read it. `name` is what an error calls it.

    Raises:
        UserError: the folder has no data files, or none of this split or configuration.
    """
    import datasets

    split = config.split
    if is_saved(folder):
        return None
    if pattern := re.search(r"[\[*?]|::", str(folder.resolve())):
        raise UserError(f"{name}: the library datasets takes {pattern[0]} in a path for a pattern; rename it")
    with _library_errors(name, config, is_folder=True):
        builder = datasets.load_dataset_builder(str(folder), config.name, data_dir=config.data_dir)
        found = builder.config.data_files or {}
    splits = {str(key): [Path(file) for file in files] for key, files in found.items()}
    files = {file for of_split in splits.values() for file in of_split}
    if not files or not all(file.is_file() and kind_of(file) for file in files):
        return None
    if not re.fullmatch(r"\w+", split):  # of files the library guesses types, and reads dates from texts
        raise UserError(f"data.split={escaped(split)}: slices of local files are not read; set data.limit")
    if split not in splits:
        raise UserError(f"data.split={split}: {name} has only {', '.join(splits)}")
    root = Path(os.path.commonpath([file.parent for file in files]))
    beside = {file for file in root.rglob("*.*") if _may_hold_rows(file) and file.name not in _INFOS}
    return DataFiles(splits[split], sorted(beside - files))


def _may_hold_rows(file: Path) -> bool:
    return kind_of(file) is not None or file.suffix.lower() in _OTHER_ROWS


def columns_of_folders(file: str) -> dict[str, str]:
    """The columns that the names of folders give to all rows of a file, as Hive and Spark partition data.

    `file` is the path of the file in its data set, such as `group=safe/part-0.parquet`.
    """
    named = (folder.partition("=") for folder in PurePath(file).parts[:-1] if "=" in folder)
    return {column: "" if value == _HIVE_NULL else unquote(value) for column, _, value in named}


def refuse_parts(config: SourceConfig, name: str, what: str) -> None:
    """Make sure that no split, configuration or folder is asked of data that have none.

    Raises:
        UserError: one is; it would have no effect.
    """
    for key, parts in (("split", "splits"), ("name", "configurations"), ("data_dir", "folders")):
        value = getattr(config, key)
        if value != SourceConfig.model_fields[key].default:
            raise UserError(
                f"data.{key}={escaped(value)}: {name} is {what}, which has no {parts}; leave it out"
            )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def read_datasets(path: Path, config: SourceConfig, name: str, columns: frozenset[str]) -> Read:
    """A folder written by `save_to_disk`, else whatever `load_dataset` finds under that name.

    Raises:
        UserError: it cannot be loaded, or has no such split or configuration.
    """
    import datasets

    with _library_errors(name, config, path.is_dir()):
        if is_saved(path):
            data: Any = _saved(datasets.load_from_disk(str(path)), config, name)
        else:
            data = datasets.load_dataset(str(path), config.name, data_dir=config.data_dir, split=config.split)
    declared = tuple(data.column_names)
    if columns.isdisjoint(declared):  # it would have no rows without a column
        return Read(((number, {}) for number in range(1, data.num_rows + 1)), declared)
    data = data.select_columns([column for column in declared if column in columns])
    tables = data.with_format("arrow").iter(batch_size=ARROW_ROWS)
    rows = arrow_rows(batch for table in tables for batch in table.to_batches())
    # Values of several types in one column are texts of JSON in the library's tables.
    json = datasets.Features({name: one for name, one in data.features.items() if "Json(" in repr(one)})
    return Read(_decoded(rows, json) if json else rows, declared)


def _decoded(rows: Iterator[NumberedRow], features: Any) -> Iterator[NumberedRow]:
    for number, row in rows:
        if isinstance(row, Unreadable):
            yield number, row
        else:
            yield number, row | features.decode_example({name: row[name] for name in features})


def _saved(data: Any, config: SourceConfig, name: str) -> Any:
    """The split of a data set that `save_to_disk` wrote, or of several."""
    if not isinstance(data, dict):
        refuse_parts(config, name, "one that was saved without splits")
        return data
    if config.split not in data:
        raise UserError(f"data.split={config.split}: {name} has only {', '.join(data)}")
    refuse_parts(config.model_copy(update={"split": "train"}), name, "one that was saved with its splits")
    return data[config.split]


@contextmanager
def _library_errors(name: str, config: SourceConfig, is_folder: bool) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        if several := _CONFIGURATIONS.search(str(error)):
            given = f"data.name={escaped(config.name)}" if config.name else "data.name: is not set"
            raise UserError(f"{given}; {name} has the configurations {escaped(several[1])}") from None
        beginning = "" if is_folder else "no such file, and "
        raise UserError(
            f"{name}: {beginning}as a data set of split {config.split} it cannot be loaded "
            f"({_why_not_loaded(error)})"
        ) from None


def _why_not_loaded(error: Exception) -> str:
    """The reason in a line, without what the messages of Arrow quote: the row that it cannot parse."""
    from datasets.exceptions import DatasetGenerationError
    from datasets.table import CastError

    if isinstance(error, DatasetGenerationError) and (cause := error.__cause__) is not None:
        if isinstance(cause, CastError):
            return "its files do not have the same columns"
        return f"{type(cause).__name__} in one of its files"
    return type(error).__name__ if isinstance(error, pa.ArrowInvalid) else first_line(error)
