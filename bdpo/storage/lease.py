"""A run folder is one command's at a time: a file lock, or on object storage a lease that is kept alive."""

from __future__ import annotations

import _thread
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from upath import UPath

from bdpo.storage.paths import StoragePath, write_bytes

BEAT_SECONDS = 5.0

LEASE_SECONDS = 30.0
"""So long a lock on object storage may be without a sign of life before another command takes it."""


def lock(folder: StoragePath) -> FileLock | Lease:
    """Take a folder for this process alone, until the block ends or the process dies.

    Raises:
        Timeout: another process has it.
    """
    if not isinstance(folder, Path):
        return Lease(folder / ".lock")
    local = FileLock(folder / ".lock")
    local.acquire(timeout=0)
    return local


def lock_holder(folder: StoragePath) -> str:
    """The host and pid that a folder's lock names; nothing for a local one, which names none."""
    if isinstance(folder, Path):
        return ""
    try:
        found = json.loads(_get(folder / ".lock"))
        return f" (pid {found['pid']} on {found['host']})"
    except Exception:  # it has ended since, or the storage is away: no reason to say less of the rest
        return ""


def _get(file: UPath) -> bytes:
    """An object in one GET: an open file asks for its ETag first, which changes with every sign of life."""
    content: bytes = file.fs.cat_file(file.path)
    return content


class Lease:
    """A lock on object storage: an object that its holder writes anew every few seconds.

    It is created by a conditional PUT, which one of two processes wins. Whoever finds it watches it: if
    it changes, the holder lives; if it does not for `LEASE_SECONDS`, the holder is dead and its lock is
    taken. No clocks are compared. A holder that was cut off for so long finds another's lock and stops.
    """

    def __init__(self, file: UPath) -> None:
        self.file = file
        self.holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self.released = threading.Event()
        if not self._create():
            self._take_over()
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Stop beating and remove the object, if it is still this one's."""
        self.released.set()
        self.beating.join()
        if self._is_mine():
            self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            self.file.fs.pipe_file(self.file.path, self._content(), mode="create")
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        found = self._read()
        print(
            f"{self.file}: is there; seeing for {LEASE_SECONDS:g} s whether its command lives",
            file=sys.stderr,
        )
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 2)
            now = self._read()
            if now is None and self._create():
                return
            if now != found:
                raise Timeout(str(self.file))
        write_bytes(self.file, self._content())
        time.sleep(BEAT_SECONDS)  # of two that take it at once the last writer has it
        if not self._is_mine():
            raise Timeout(str(self.file))

    def _beat(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            try:
                if not self._is_mine():
                    print(f"{self.file}: was taken by another command", file=sys.stderr)
                    return _thread.interrupt_main()
                write_bytes(self.file, self._content())
            except Exception:  # noqa: S112 (storage that is away for a moment; whoever watches has more patience)
                continue

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "beat": uuid.uuid4().hex}).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(_get(self.file))
        except FileNotFoundError:
            return None
        return content

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found["token"] == self.holder["token"]
