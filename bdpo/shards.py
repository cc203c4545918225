"""A folder of Parquet shards, each of which is there whole or not at all.

The shard is the commit unit of everything that many actors make together: scores, responses,
verdicts. Its name carries the first row and a digest of the file's content, its Parquet metadata the
fingerprint of the inputs. So a rerun knows which rows are done, and a damaged or foreign shard is
never taken for one of ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from bdpo.runs import Fingerprint, refuse_other
from bdpo.storage import StoragePath, matching, parquet_bytes, write_bytes

_NAME = re.compile(r"part-(\d{9})-([0-9a-f]{16})\.parquet")
_METADATA_KEY = b"bdpo.fingerprint"


@dataclass(frozen=True)
class ShardStore:
    """Shards of `schema` in `folder`; `mode` is the file mode, 0600 for text that is private."""

    folder: StoragePath
    schema: pa.Schema
    fingerprint: Fingerprint
    mode: int = 0o644

    def write(self, first_row: int, table: pa.Table) -> StoragePath:
        """Commit the rows from `first_row` on. The table's metadata stay."""
        metadata = {**(table.schema.metadata or {}), _METADATA_KEY: json.dumps(self.fingerprint).encode()}
        content = parquet_bytes(table.cast(self.schema).replace_schema_metadata(metadata))
        shard = self.folder / f"part-{first_row:09d}-{_digest(content)}.parquet"
        write_bytes(shard, content, self.mode)
        return shard

    def finished(self) -> dict[int, int]:
        """First row -> number of rows of every valid shard; damaged and repeated ones are removed.

        Raises:
            UserError: a shard was made with other inputs; the message names the field.
        """
        return {first: self._rows(shard, content) for first, shard, content in self._shards()}

    def missing(
        self, total_rows: int, shard_rows: int, given_up: Collection[int] = ()
    ) -> list[tuple[int, int]]:
        """(first row, number of rows) still to be made so that all rows are there exactly once.

        Finished shards stay, of whatever size they are, but for one that overlaps another; the gaps
        between them are cut into `shard_rows`. Rows that are `given_up` are not asked for again.
        """
        gaps, row = [], 0
        taken = [*self.finished().items(), *((row, 1) for row in given_up)]
        for first, rows in [*sorted(taken), (total_rows, 0)]:
            if first < row:
                self.remove(first)
                continue
            gaps += [(start, min(shard_rows, first - start)) for start in range(row, first, shard_rows)]
            row = first + rows
        return gaps

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Shard after shard in the order of the rows, each with its metadata."""
        for *_, content in self._shards():
            yield pq.read_table(pa.BufferReader(content), columns=columns)

    def read(self) -> pa.Table:
        """All rows in order."""
        tables = [table.replace_schema_metadata(None) for table in self.tables()]
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def read_shard(self, first_row: int) -> pa.Table:
        """The rows of the shard that starts at `first_row`."""
        shard = matching(self.folder, f"part-{first_row:09d}-*.parquet")[0]
        return pq.read_table(pa.BufferReader(shard.read_bytes()))

    def remove(self, first_row: int) -> None:
        """Forget the shard that starts at `first_row`, so that its rows are made again."""
        for shard in matching(self.folder, f"part-{first_row:09d}-*.parquet"):
            shard.unlink()

    def _shards(self) -> Iterator[tuple[int, StoragePath, bytes]]:
        """(first row, file, content) of valid shards, by first row.

        A retried task may have written its rows twice: the first stays.
        """
        seen = -1
        for shard in matching(self.folder, "part-*.parquet"):
            match, content = _NAME.fullmatch(shard.name), shard.read_bytes()
            if match and int(match[1]) != seen and _digest(content) == match[2]:
                seen = int(match[1])
                yield seen, shard, content
            else:
                shard.unlink()

    def _rows(self, shard: StoragePath, content: bytes) -> int:
        parquet = pq.read_metadata(pa.BufferReader(content))
        made_with = json.loads((parquet.metadata or {}).get(_METADATA_KEY, b"{}"))
        refuse_other(shard, made_with, self.fingerprint)
        return int(parquet.num_rows)


def _digest(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
