"""A folder of Parquet shards, each of which is complete or absent.

A shard is the unit in which many actors commit what they make together: scores, responses, verdicts. Its
name contains the first row and a digest of the file's content, and its Parquet metadata the fingerprint of
the inputs. The folder alone therefore determines which rows are done: there is no list beside it that a
kill could leave wrong, and a damaged shard or one of other inputs is never used. Readers skip damaged shards.
Only `missing` removes them, which the command that holds the lock of the run calls. A file of another program
is refused and left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo.errors import UserError
from bdpo.storage.manifests import Fingerprint, require_same_fingerprint
from bdpo.storage.paths import (
    StoragePath,
    at_once,
    parquet_bytes,
    read_bytes,
    sorted_from,
    sorted_glob,
    write_bytes,
)

_NAME = re.compile(r"part-(\d{9})-([0-9a-f]{16})\.parquet")

_METADATA_KEY = b"bdpo.fingerprint"


class Shard(TypedDict):
    """The rows that an actor is asked to make: `rows` of them from row `first` on."""

    first: int
    rows: int


class ShardActor:
    """What makes shards: it is called with a `Shard` and commits it."""

    def progress(self, rows: float) -> None:
        """A sign of life while a shard is made, of which `rows` are done so far, parts of rows included.

        An actor calls it as often as it likes; who watches the actor puts a function in its place.
        """


@dataclass(frozen=True)
class ShardStore:
    """Shards of `schema` in `folder`; `mode` is the file mode, 0600 for private text."""

    folder: StoragePath
    schema: pa.Schema
    fingerprint: Fingerprint
    mode: int = 0o644

    def write(self, first_row: int, table: pa.Table) -> StoragePath:
        """Commit a table as the rows from `first_row` on. The metadata of the table are kept."""
        metadata = {**(table.schema.metadata or {}), _METADATA_KEY: json.dumps(self.fingerprint).encode()}
        content = parquet_bytes(table.cast(self.schema).replace_schema_metadata(metadata))
        shard = self.folder / f"part-{first_row:09d}-{_digest(content)}.parquet"
        write_bytes(shard, content, self.mode)
        return shard

    def finished(self) -> dict[int, int]:
        """First row -> number of rows of every valid shard.

        Raises:
            UserError: a shard was made with other inputs (the message names the field), or is no shard.
        """
        return {first: _rows(content) for first, _, content in self._shards()}

    def missing(
        self, total_rows: int, shard_rows: int, given_up: Collection[int] = ()
    ) -> list[tuple[int, int]]:
        """(first row, number of rows) of the shards to make so that every row exists exactly once.

        Finished shards of any size are kept, except one that overlaps another. The gaps between them are cut
        into shards of `shard_rows`; rows in `given_up` are left out. Damaged and repeated shards and the
        temporary files of killed processes are removed, so only the command that holds the lock of the run
        may call this.

        Raises:
            UserError: as `finished`; nothing is removed then.
        """
        gaps, row = [], 0
        taken = [(first, False, rows) for first, rows in self._tidied().items()]
        taken += [(row, True, 1) for row in given_up]
        for first, is_given_up, rows in [*sorted(taken), (total_rows, True, 0)]:
            if first < row:
                if not is_given_up:
                    self.remove(first)
                continue
            gaps += [(start, min(shard_rows, first - start)) for start in range(row, first, shard_rows)]
            row = first + rows
        return gaps

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the shards in the order of their rows, each with its metadata.

        Raises:
            UserError: as `finished`.
        """
        for *_, content in self._shards():
            yield _table(content, columns)

    def read(self) -> pa.Table:
        """All rows in order."""
        tables = [table.replace_schema_metadata(None) for table in self.tables()]
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def holds(self, first_row: int, rows: int) -> bool:
        """Whether a valid shard of exactly `rows` rows starts at `first_row`."""
        return any(_rows(content) == rows for *_, content in self._from(first_row))

    def read_shard(self, first_row: int) -> pa.Table:
        """The rows of the shard that starts at `first_row`."""
        ((*_, content),) = self._from(first_row)
        return _table(content)

    def remove(self, first_row: int) -> None:
        """Remove the shard that starts at `first_row`, so that its rows are made again."""
        for shard in sorted_from(self.folder, f"part-{first_row:09d}-"):
            shard.unlink(missing_ok=True)

    def _tidied(self) -> dict[int, int]:
        """The result of `finished`, after damaged and repeated shards and temporary files are removed."""
        files = sorted_glob(self.folder, "*")  # once: a bucket lists a thousand objects a request
        temporary = [file for file in files if _NAME.fullmatch(file.stem.removeprefix("."))]
        leftover = {*temporary, *(file for file in files if file.name.startswith("part-"))}
        found = {}
        for first, shard, content in self._valid(files):
            found[first] = _rows(content)
            leftover.discard(shard)
        for file in leftover:
            file.unlink(missing_ok=True)
        return found

    def _shards(self) -> Iterator[tuple[int, StoragePath, bytes]]:
        """See `_valid`; all shards of the folder."""
        return self._valid(sorted_glob(self.folder, "*"))

    def _from(self, first_row: int) -> Iterator[tuple[int, StoragePath, bytes]]:
        """See `_valid`; the shards that start at `first_row`, each of which an actor asks for once."""
        return self._valid(sorted_from(self.folder, f"part-{first_row:09d}-"))

    def _valid(self, listed: Iterable[StoragePath]) -> Iterator[tuple[int, StoragePath, bytes]]:
        """(first row, file, content) of the valid shards among the files of the folder, by first row.

        A retried task may have written its rows twice, with another content: the first by name counts.
        """
        seen = -1
        files = _named(listed)
        contents = at_once(_content, [shard for shard, _ in files])
        for (shard, match), content in zip(files, contents, strict=True):
            first = int(match[1])
            if first != seen and _digest(content) == match[2]:
                made_with = (pq.read_metadata(pa.BufferReader(content)).metadata or {}).get(
                    _METADATA_KEY, b"{}"
                )
                require_same_fingerprint(shard, json.loads(made_with), self.fingerprint)
                seen = first
                yield first, shard, content


def _named(files: Iterable[StoragePath]) -> list[tuple[StoragePath, re.Match[str]]]:
    """The files of a folder that are named like shards.

    Raises:
        UserError: another program writes Parquet files here.
    """
    shards = []
    for file in files:
        match = _NAME.fullmatch(file.name)
        if match:
            shards.append((file, match))
        elif file.name.startswith("part-") or (file.suffix == ".parquet" and not file.name.startswith(".")):
            raise UserError(f"{file}: not a shard of bdpo; move it out of this folder")
    return shards


def _content(shard: StoragePath) -> bytes:
    """The content of a file, empty if another process removed it since it was listed."""
    try:
        return read_bytes(shard)
    except FileNotFoundError:
        return b""


def _table(content: bytes, columns: list[str] | None = None) -> pa.Table:
    # Of a small file `pq.read_table`, which makes a data set of it, takes three times as long.
    return pq.ParquetFile(pa.BufferReader(content)).read(columns)


def _rows(content: bytes) -> int:
    return int(pq.read_metadata(pa.BufferReader(content)).num_rows)


def _digest(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
