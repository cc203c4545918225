"""SHA-256 digests of files and JSON values; fingerprints consist of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from bdpo.storage.cache import LOCK_SECONDS, cache_folder
from bdpo.storage.paths import StoragePath, at_once, write_text

# File systems have coarse clocks: a file that changed just now could change again with the same time stamp.
_CLOCK_RESOLUTION_NS = 2 * 10**9


def files_digest(
    files: Sequence[StoragePath], root: Path | None = None, digest_of: Callable[[Any], str] | None = None
) -> str:
    """SHA-256 over names (below `root`, else bare) and contents of files, as 32 hexadecimal digits.

    `digest_of` computes the SHA-256 of one file, by default `sha256`.
    """
    of_file = digest_of or sha256
    digests = {}
    found = at_once(lambda file: of_file(file) if file.is_file() else None, files)
    for file, digest in zip(files, found, strict=True):
        if digest is not None:
            digests[str(file.relative_to(root)) if root and isinstance(file, Path) else file.name] = digest
    return json_digest(digests)


def cached_sha256(file: Path) -> str:
    """The SHA-256 of a large file, computed once per machine and kept in the cache folder.

    The digest is kept with the size, times and inode of the file, and used while these stay the same.
    """
    status = file.stat()
    now = json_digest([status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    kept = cache_folder() / "digests" / json_digest(str(file.resolve()))
    with _one_process_at_a_time(kept):
        with suppress(OSError, ValueError):
            then, digest = kept.read_text(encoding="utf-8").split()
            if then == now:
                return digest
        digest = sha256(file)
        if time.time_ns() - status.st_mtime_ns > _CLOCK_RESOLUTION_NS:
            with suppress(OSError):  # without a writable cache the next call computes it again
                write_text(kept, f"{now} {digest}")
        return digest


@contextmanager
def _one_process_at_a_time(kept: Path) -> Iterator[None]:
    """The actors of a node start together: one reads the file and the others wait, if there is a lock."""
    with ExitStack() as held:
        with suppress(OSError):
            lock = kept.parents[1] / "locks" / kept.name
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock, timeout=LOCK_SECONDS))
        yield


def json_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, as 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sha256(file: StoragePath) -> str:
    """SHA-256 of a file's content, read in blocks."""
    content: Any = file.open("rb")
    with content as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
