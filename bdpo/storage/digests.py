"""SHA-256 digests of files and JSON values, which fingerprints are made of."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from bdpo.storage.cache import cache_folder
from bdpo.storage.paths import StoragePath, write_text

# File systems have coarse clocks: a file that changed just now could change again at the same time.
_SETTLED_NS = 2 * 10**9


def files_digest(
    files: Sequence[StoragePath], root: Path | None = None, read: Callable[[Any], str] | None = None
) -> str:
    """SHA-256 over names (below `root`, else bare) and contents of files, as 32 hexadecimal digits.

    `read` is what tells the SHA-256 of one file.
    """
    read = read or sha256
    digests = {}
    for file in files:
        if file.is_file():
            name = str(file.relative_to(root)) if root and isinstance(file, Path) else file.name
            digests[name] = read(file)
    return json_digest(digests)


def _read_once(file: Path) -> str:
    """The file's SHA-256, kept in the cache folder together with what a change of the file would change."""
    status = file.stat()
    now = json_digest([status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    kept = cache_folder() / "digests" / json_digest(str(file.resolve()))
    with _one_process(kept):
        with suppress(OSError, ValueError):
            then, digest = kept.read_text(encoding="utf-8").split()
            if then == now:
                return digest
        digest = sha256(file)
        if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
            with suppress(OSError):  # without a cache it is only slower
                write_text(kept, f"{now} {digest}")
        return digest


@contextmanager
def _one_process(kept: Path) -> Iterator[None]:
    """The actors of a node begin together: one reads, the others wait, if the cache can be written."""
    with ExitStack() as held:
        with suppress(OSError):
            lock = kept.parents[1] / "locks" / kept.name
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock))
        yield


def json_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, as 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sha256(file: StoragePath) -> str:
    """SHA-256 of a file's content, which is never all in memory."""
    content: Any = file.open("rb")
    with content as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
