"""Requests to object storage that a command waits for, one after the other: shards, pairs and their digests.

    python -m benchmarks.storage

An S3 server on loopback counts nothing of a network's time, so requests are counted: all of them, and those
in a row, of which each begins when the one before has ended. Times are those and the network's latency.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from bdpo.data.pairs import all_pairs, count_pairs, pair_files, pairs_digest
from bdpo.storage.paths import StoragePath, storage_path, upload
from bdpo.storage.s3 import LimitedS3FileSystem
from bdpo.storage.shards import ShardStore
from benchmarks.common import write_section
from benchmarks.random_pairs import prepared

SHARDS, SHARD_ROWS, PAIRS = 40, 512, 40_000


class Requests:
    """Begin and end of each request since the last `clear`, as `time.perf_counter` has them."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float, str]] = []

    def in_a_row(self) -> int:
        """The most requests of which each began after the one before had ended."""
        depths: list[tuple[float, int]] = []
        for begin, end, _ in sorted(self.spans):
            depths.append((end, 1 + max((depth for ended, depth in depths if ended <= begin), default=0)))
        return max((depth for _, depth in depths), default=0)

    def of(self, method: str) -> int:
        """How many requests there were of a method of S3's API."""
        return sum(name == method for *_, name in self.spans)


@contextmanager
def counted_requests() -> Iterator[Requests]:
    """Count the requests of this process to S3."""
    requests, call = Requests(), LimitedS3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **request: Any) -> Any:
        begun = time.perf_counter()
        try:
            return await call(self, method, *arguments, **request)
        finally:
            requests.spans.append((begun, time.perf_counter(), method))

    LimitedS3FileSystem._call_s3 = counted
    try:
        yield requests
    finally:
        LimitedS3FileSystem._call_s3 = call


def main() -> None:
    """Count the requests of each operation and write the section."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:{1}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import boto3

    boto3.client("s3").create_bucket(Bucket="benchmark")
    rows = [
        "| operation | requests | in a row | HEAD |",
        "|---|---|---|---|",
        *(
            _row(name, work)
            for name, work in operations(storage_path("s3://benchmark/run", "run_dir")).items()
        ),
    ]
    server.stop()
    print(*rows, sep="\n")
    write_section("Object storage: requests", rows)


def operations(root: StoragePath) -> dict[str, Callable[[], Any]]:
    """What is measured, by name, of shards and pairs that are written first."""
    store = ShardStore(root / "scores", pa.schema([("x", pa.int64())]), {"a": 1})
    for first in range(0, SHARDS * SHARD_ROWS, SHARD_ROWS):
        store.write(first, pa.table({"x": range(SHARD_ROWS)}))
    pairs = root / "pairs"
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder), PAIRS)
        upload(Path(folder) / "run" / "data" / "pairs", pairs)  # type: ignore[arg-type]
    parts = len(pair_files(pairs))
    return {
        f"{SHARDS} shards, what is missing": lambda: store.missing(SHARDS * SHARD_ROWS, SHARD_ROWS),
        f"{SHARDS} shards, read": store.read,
        f"pairs of {parts} files, counted": lambda: count_pairs(pairs),
        f"pairs of {parts} files, their digest": lambda: pairs_digest(pairs),
        f"pairs of {parts} files, ids and labels": lambda: all_pairs(pairs, ["pair_id", "chosen_safe"]),
    }


def _row(name: str, work: Callable[[], Any]) -> str:
    with counted_requests() as requests:
        work()
    return f"| {name} | {len(requests.spans)} | **{requests.in_a_row()}** | {requests.of('head_object')} |"


if __name__ == "__main__":
    main()
