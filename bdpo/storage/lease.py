"""Locks of a run folder, which one command uses at a time: a file lock, or a lease on object storage."""

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

RENEWAL_SECONDS = 5.0

LEASE_SECONDS = 30.0
"""The time without a renewal after which another command may take a lease."""


def lock(folder: StoragePath) -> FileLock | Lease:
    """Lock a folder for this process, until the block ends or the process dies.

    Raises:
        Timeout: another process holds the lock.
    """
    if not isinstance(folder, Path):
        return Lease(folder / ".lock")
    local = FileLock(folder / ".lock")
    local.acquire(timeout=0)
    return local


def lock_holder(folder: StoragePath) -> str:
    """The holder of a folder's lease as " (pid … on …)"; empty for a file lock, which records no holder."""
    if isinstance(folder, Path):
        return ""
    try:
        found = json.loads(_get_object(folder / ".lock"))
        return f" (pid {found['pid']} on {found['host']})"
    except Exception:  # released meanwhile, or the storage is unavailable: the message works without
        return ""


def _get_object(file: UPath) -> bytes:
    """Read an object in one GET: opening it would ask for its ETag first, which each renewal changes."""
    content: bytes = file.fs.cat_file(file.path)
    return content


class Lease:
    """A lock on object storage: an object that its holder rewrites every `RENEWAL_SECONDS`.

    The object is created by a conditional PUT, which only one of two processes wins. A process that finds the
    object watches it. If it changes, its holder is alive. If it stays the same for `LEASE_SECONDS`, its
    holder is taken for dead and the lease is taken over. The watching process alone measures the time: clocks
    of two machines are never compared. A holder that was cut off from the storage for so long finds another
    holder's token when it comes back, and stops.
    """

    def __init__(self, file: UPath) -> None:
        self.file = file
        self.holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self.released = threading.Event()
        if not self._create():
            self._take_over()
        self.renewal = threading.Thread(target=self._renew, daemon=True)
        self.renewal.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Stop renewing, and remove the object if this lease still holds it."""
        self.released.set()
        self.renewal.join()
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
            f"{self.file}: exists; waiting {LEASE_SECONDS:g} s to see whether its command is alive",
            file=sys.stderr,
        )
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(RENEWAL_SECONDS / 2)
            now = self._read()
            if now is None and self._create():
                return
            if now != found:
                raise Timeout(str(self.file))
        write_bytes(self.file, self._content())
        time.sleep(RENEWAL_SECONDS)  # if two take it over at once, the last writer holds it
        if not self._is_mine():
            raise Timeout(str(self.file))

    def _renew(self) -> None:
        while not self.released.wait(RENEWAL_SECONDS):
            try:
                if not self._is_mine():
                    print(f"{self.file}: was taken by another command", file=sys.stderr)
                    return _thread.interrupt_main()
                write_bytes(self.file, self._content())
            except Exception:  # noqa: S112 (unavailable for a moment; who watches waits for several renewals)
                continue

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "renewal": uuid.uuid4().hex}).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(_get_object(self.file))
        except FileNotFoundError:
            return None
        return content

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found["token"] == self.holder["token"]
