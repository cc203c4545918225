"""The prepared preference pairs: their schema, their rows, and reading them back from the run folder.

Their token ids are made once, when they are prepared: scoring and every epoch of training read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bdpo.data.formats.base import Pair
from bdpo.storage.digests import files_digest
from bdpo.storage.paths import StoragePath, at_once, open_parquet, read_bytes, sorted_glob

if TYPE_CHECKING:
    from bdpo.models.packing import PrefixGroups

_IDS = pa.list_(pa.int32())

PairIds = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The token ids of prompt, chosen and rejected, int32."""

ID_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]

PAIR_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field(
            "prompt", pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), nullable=False
        ),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("chosen_safe", pa.bool_()),
        pa.field("rejected_safe", pa.bool_()),
        # JSON of what else the template writes: tools, arguments, messages with more than role and content
        pa.field("context", pa.string()),
        *(pa.field(name, _IDS, nullable=False) for name in ID_COLUMNS),
    ]
)


def plain_turns(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages with their role and content alone."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def context_of(pair: Pair) -> dict[str, Any] | None:
    """What a pair holds beside plain texts, for the column `context`; None for most.

    Its keys stay in their order, in which a template may write them.
    """
    context: dict[str, Any] = {}
    if any(len(message) > 2 for message in (*pair.prompt, pair.chosen, pair.rejected)):
        context["messages"] = [*pair.prompt, pair.chosen, pair.rejected]
    if pair.tools:
        context["tools"] = pair.tools
    if pair.template_kwargs:
        context["template_kwargs"] = pair.template_kwargs
    return context or None


def table_of(prepared: Iterable[tuple[str, Pair, PairIds]]) -> pa.Table:
    """The rows of `PAIR_SCHEMA` of some pairs, with their names and token ids."""
    names, pairs, ids = zip(*prepared, strict=True)
    contexts = [context_of(pair) for pair in pairs]
    columns: dict[str, Any] = {
        "pair_id": names,
        "prompt": [plain_turns(pair.prompt) for pair in pairs],
        "chosen": [pair.chosen["content"] for pair in pairs],
        "rejected": [pair.rejected["content"] for pair in pairs],
        "group": [pair.group for pair in pairs],
        "chosen_safe": [pair.chosen_safe for pair in pairs],
        "rejected_safe": [pair.rejected_safe for pair in pairs],
        "context": [json.dumps(context) if context else None for context in contexts],
    }
    for name, arrays in zip(ID_COLUMNS, zip(*ids, strict=True), strict=True):
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
        columns[name] = pa.ListArray.from_arrays(offsets, np.concatenate(arrays))
    return pa.table(columns, schema=PAIR_SCHEMA)


def pair_of(row: Mapping[str, Any]) -> Pair:
    """The pair of a prepared row, with all that its column `context` holds; its labels are not read."""
    context = json.loads(row["context"]) if row["context"] else {}
    answers = [{"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")]
    *prompt, chosen, rejected = context.get("messages") or [*row["prompt"], *answers]
    return Pair(
        prompt,
        chosen,
        rejected,
        tools=context.get("tools"),
        template_kwargs=context.get("template_kwargs", {}),
    )


def prefix_groups(pairs: pa.Table) -> PrefixGroups:
    """`[c(x) | y_w | y_l]` of prepared pairs, within the lengths that they were prepared for."""
    from bdpo.models.packing import PrefixGroups  # status counts pairs and needs no torch

    columns = [pairs[name].combine_chunks() for name in ID_COLUMNS]
    tokens = [column.flatten().to_numpy() for column in columns]
    lengths = [pc.list_value_length(column).to_numpy().astype(np.int64) for column in columns]
    begins = accumulate(map(len, tokens[:-1]), initial=0)
    starts = [begin + length.cumsum() - length for begin, length in zip(begins, lengths, strict=True)]
    return PrefixGroups(np.concatenate(tokens), np.stack(starts, axis=1), np.stack(lengths, axis=1))


class PairReader:
    """Reads the pairs that `prepare` wrote into a folder.

    It remembers how many rows each part has: a part is opened only for rows of its own, or to count it once.
    Parts never change while a command works with them; whoever prepares anew makes a new reader.
    """

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder
        self.rows: dict[StoragePath, int] = {}

    @cached_property
    def parts(self) -> list[StoragePath]:
        """All of them, in order."""
        return pair_files(self.folder)

    def read(self, first: int, count: int, columns: list[str] | None = None) -> pa.Table:
        """Rows [first, first + count); only their row groups are read. `columns` are all by default.

        Parts after them are not opened.
        """
        tables: list[pa.Table] = []
        begin = 0
        for part in self.parts:
            if begin >= first + count:
                break
            if part not in self.rows or begin + self.rows[part] > first:
                with pq.ParquetFile(open_parquet(part)) as parquet:
                    self.rows[part] = parquet.metadata.num_rows
                    tables += _row_groups(parquet, first - begin, first - begin + count, columns)
            begin += self.rows[part]
        return pa.concat_tables(tables) if tables else PAIR_SCHEMA.empty_table()


def _row_groups(
    parquet: pq.ParquetFile, first: int, end: int, columns: list[str] | None
) -> Iterator[pa.Table]:
    """Rows [first, end) of one file, a table a row group."""
    position = 0
    for group in range(parquet.num_row_groups):
        start, position = position, position + parquet.metadata.row_group(group).num_rows
        begin, until = max(first, start), min(end, position)
        if begin < until:
            yield parquet.read_row_group(group, columns).slice(begin - start, until - begin)


def read_pairs(folder: StoragePath, first: int, count: int, columns: list[str] | None = None) -> pa.Table:
    """Rows [first, first + count) of the pairs in `folder`, once; see `PairReader`."""
    return PairReader(folder).read(first, count, columns)


def pair_tables(folder: StoragePath, columns: list[str]) -> Iterator[pa.Table]:
    """These columns of all pairs in `folder`, in order, a table a part."""

    def read(part: StoragePath) -> pa.Table:
        # Of an object in one request, with its texts: a range for each column of each row group is slower.
        source = part if isinstance(part, Path) else pa.BufferReader(read_bytes(part))
        return pq.read_table(source, columns=columns, partitioning=None)

    return at_once(read, pair_files(folder))


def all_pairs(folder: StoragePath, columns: list[str]) -> pa.Table:
    """These columns of all pairs in `folder`, in order."""
    return pa.concat_tables(pair_tables(folder, columns))


def last_turns(folder: StoragePath) -> Iterator[str]:
    """The last message of the prompt of every pair in `folder`, in order, a row group at a time."""
    for part in pair_files(folder):
        with pq.ParquetFile(open_parquet(part)) as parquet:
            for batch in parquet.iter_batches(columns=["prompt"]):
                yield from (prompt[-1]["content"] or "" for prompt in batch["prompt"].to_pylist() if prompt)


def pair_ids(folder: StoragePath) -> Iterator[str]:
    """The ids of all pairs in `folder`, in order; their texts are not read."""

    def read(part: StoragePath) -> pa.ChunkedArray:
        with pq.ParquetFile(open_parquet(part)) as parquet:
            return parquet.read(["pair_id"])["pair_id"]

    for ids in at_once(read, pair_files(folder)):
        yield from ids.to_pylist()


def pairs_digest(folder: StoragePath) -> str:
    """The digest of the files that `prepare` wrote into `folder`."""
    return files_digest(pair_files(folder))


def count_pairs(folder: StoragePath) -> int:
    """How many pairs `prepare` wrote into `folder`."""
    return sum(at_once(lambda part: int(pq.read_metadata(open_parquet(part)).num_rows), pair_files(folder)))


def pair_files(folder: StoragePath) -> list[StoragePath]:
    """The files that `prepare` wrote into `folder`, in order."""
    return sorted_glob(folder, "*.parquet")
