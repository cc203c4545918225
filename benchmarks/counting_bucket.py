"""Object storage in memory that counts its requests, for `benchmarks.scale`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from bdpo.storage.limits import AT_ONCE
from bdpo.storage.paths import StoragePath, storage_path

START = len("part-000000000-")
"""Names are found by so many of their first characters, without a look at all others."""

LISTED = 1000
"""Objects that S3 lists in one request."""


class Bucket(AbstractFileSystem):
    """Object storage in the memory of this process; many objects may share one content.

    `requests` counts all requests, `alone` those of the main thread: for each of them everything else waits.
    """

    protocol = "counted"
    requests = alone = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.folders: dict[str, dict[str, bytes | None]] = {"": {}}
        self.starts: dict[str, set[str]] = {}  # folder and START characters of a name -> names
        self.lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("counted://").strip("/")

    def request(self, times: int = 1) -> None:
        """A request, or several in a row."""
        with self.lock:
            Bucket.requests += times
            if threading.current_thread() is threading.main_thread():
                Bucket.alone += times

    def link(self, path: str, content: bytes | None) -> None:
        """An object of this content, without a request; None: a folder."""
        folder, _, name = self._strip_protocol(path).rpartition("/")
        if folder not in self.folders:
            self.link(folder, None)
            self.folders[folder] = {}
        self.folders[folder][name] = content
        self.starts.setdefault(f"{folder}/{name[:START]}", set()).add(name)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Names or infos in a folder."""
        path = self._strip_protocol(path)
        found = dict(self.folders.get(path, {}))
        self.request(max(1, -(-len(found) // LISTED)))
        if not found:
            return [self._entry(path)] if detail else [self._entry(path)["name"]]
        entries = [self._entry(f"{path}/{name}") for name in found]
        return entries if detail else [entry["name"] for entry in entries]

    def find(self, path: str, prefix: str = "", **_: Any) -> list[str]:
        """Names of the files in a folder without folders that begin with `prefix`."""
        path = self._strip_protocol(path)
        names = self.folders.get(path, {})
        among = self.starts.get(f"{path}/{prefix[:START]}", set()) if len(prefix) >= START else names
        found = [f"{path}/{name}" for name in among if name in names and name.startswith(prefix)]
        self.request(max(1, -(-len(found) // LISTED)))
        return found

    def info(self, path: str, **_: Any) -> Any:
        """Size and kind."""
        self.request()
        return self._entry(self._strip_protocol(path))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        """The content of an object, or a range of it."""
        self.request()
        return self.content(path)[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Write an object."""
        self.request()
        self.link(path, bytes(value))

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        self.request()
        folder, _, name = self._strip_protocol(path).rpartition("/")
        self.folders.get(folder, {}).pop(name, None)

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        """A file whose size is asked first; each read is a request."""
        self.request()
        return _Ranges(self, self.content(path))

    def content(self, path: str) -> bytes:
        """The content of an object, without a request."""
        folder, _, name = self._strip_protocol(path).rpartition("/")
        content = self.folders.get(folder, {}).get(name)
        if content is None:
            raise FileNotFoundError(path)
        return content

    def _entry(self, path: str) -> Any:
        if self.folders.get(path):
            return {"name": path, "size": 0, "type": "directory"}
        return {"name": path, "size": len(self.content(path)), "type": "file"}


class _Ranges(BytesIO):
    def __init__(self, bucket: Bucket, content: bytes) -> None:
        super().__init__(content)
        self.bucket = bucket

    def read(self, size: int | None = -1) -> bytes:
        self.bucket.request()
        return super().read(size)


def new_bucket() -> StoragePath:
    """The path of a new bucket, of a protocol of its own."""
    fsspec.register_implementation("counted", Bucket, clobber=True)
    Bucket.clear_instance_cache()
    return storage_path("counted://bucket", "run_dir")


@dataclass
class Counted:
    """What some work took: seconds of this process's processors, requests, and how many of them in a row."""

    seconds: float = 0.0
    requests: int = 0
    in_a_row: float = 0.0
    """Those of the main thread, and of the others the share that is not on its way at the same time."""

    @property
    def waits(self) -> float:
        """Seconds: those of the processors, and `LATENCY` for each request in a row."""
        return self.seconds + LATENCY * self.in_a_row


LATENCY = 0.03
"""Seconds until a bucket answers."""


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what a block of code does."""
    found, requests, alone = Counted(), Bucket.requests, Bucket.alone
    begun = time.process_time()
    yield found
    found.seconds = time.process_time() - begun
    found.requests, alone = Bucket.requests - requests, Bucket.alone - alone
    found.in_a_row = alone + (found.requests - alone) / AT_ONCE
