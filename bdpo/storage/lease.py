"""Locks of a run folder, which one command uses at a time: a file lock, or a lease on object storage.

The command that holds a lock shows signs of life: the lease is rewritten, and beside a file lock a file
`.holder` is. By these signs others distinguish a command that works from one that was killed or stands still.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from filelock import FileLock, Timeout
from upath import UPath

from bdpo.storage.paths import StoragePath, write_bytes

RENEWAL_SECONDS = 5.0

LEASE_SECONDS = 30.0
"""The time without a renewal after which another command may take a lease."""


LOST = threading.Event()
"""Set when this process has lost a lock of its own, just before its main thread is interrupted."""


def interrupt_main() -> None:
    """Send SIGINT to the main thread: `_thread.interrupt_main` would not end what it waits for."""
    signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGINT)


@dataclass(frozen=True)
class Holder:
    """The command that holds a lock; times are seconds since the epoch, by the clock of its host."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    alive: float = field(default_factory=time.time)
    """Its last sign of life."""

    def sign_of_life(self, **further: str) -> str:
        """The JSON text of a sign of life at this moment."""
        return json.dumps({**asdict(self), "alive": time.time(), **further})


class Held(ABC):
    """A lock that this process holds until it is released; a thread shows signs of life meanwhile."""

    def __init__(self) -> None:
        self.holder = Holder()
        self._acquire()
        self.released = threading.Event()
        self.renewal = threading.Thread(target=self._renew, daemon=True)
        self.renewal.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Show no more signs of life, and release the lock."""
        self.released.set()
        self.renewal.join()
        self._give_back()

    def _renew(self) -> None:
        while not self.released.wait(RENEWAL_SECONDS) and self._show_life():
            pass

    def loss(self) -> str | None:
        """Why this process does not hold the lock any more, in one line; None while it does."""
        return None

    def _stop(self, loss: str) -> bool:
        """End the command, whose lock is lost: report it, and interrupt the main thread."""
        print(f"error: {loss}; stopping", file=sys.stderr)
        LOST.set()
        interrupt_main()
        return False

    @abstractmethod
    def _acquire(self) -> None:
        """Take the lock, or raise Timeout."""

    @abstractmethod
    def _show_life(self) -> bool:
        """Show a sign of life; False if the lock is lost."""

    @abstractmethod
    def _give_back(self) -> None:
        """Release the lock."""


class HeldFolder(Held):
    """A file lock of a local or mounted folder, and signs of life beside it.

    The lock is that of a file, not of a name: who deletes the file, or the folder, lets another command in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.lock = folder, folder / ".holder", FileLock(folder / ".lock")
        super().__init__()

    def loss(self) -> str | None:
        """A line if the folder, or its lock, was deleted meanwhile."""
        try:
            if (self.folder / ".lock").stat().st_ino == self.inode:
                return None
        except FileNotFoundError:
            pass
        except OSError:  # a mount that does not answer for a moment
            return None
        what = self.folder / ".lock" if any(self.folder.glob("*")) else self.folder
        return f"{what}: was deleted while this command worked there"

    def _acquire(self) -> None:
        self.lock.acquire(timeout=0)
        self.inode = (self.folder / ".lock").stat().st_ino
        self._show_life()

    def _show_life(self) -> bool:
        if (loss := self.loss()) is not None:
            return self._stop(loss)
        with suppress(OSError):  # a full disk: the command itself reports it
            self.file.write_text(self.holder.sign_of_life())
        return True

    def _give_back(self) -> None:
        if self.loss() is None:  # else it is another command's
            self.file.unlink(missing_ok=True)
        self.lock.release()


def lock(folder: StoragePath) -> HeldFolder | Lease:
    """Lock a folder for this process, until the block ends or the process dies.

    Raises:
        Timeout: another process holds the lock.
    """
    return HeldFolder(folder) if isinstance(folder, Path) else Lease(folder / ".lock")


def read_holder(folder: StoragePath) -> Holder | None:
    """The command that holds the lock of a folder, or held it when it was killed; None if it is not known."""
    try:
        if isinstance(folder, Path):
            found = json.loads((folder / ".holder").read_bytes())
        else:
            found = json.loads(_get_object(folder / ".lock"))
        return Holder(found["host"], found["pid"], found["since"], found["alive"])
    except Exception:  # released meanwhile, half written, or the storage is unavailable
        return None


def lock_holder(folder: StoragePath) -> str:
    """The holder of a folder's lock as " (pid … on …)"; empty if it is not known."""
    holder = read_holder(folder)
    return "" if holder is None else f" (pid {holder.pid} on {holder.host})"


def shows_life(folder: StoragePath) -> bool:
    """Whether the holder of a folder's lock shows a sign of life; watches for two renewals at most.

    Only changes count: the clocks of two machines are never compared.
    """
    before, end = read_holder(folder), time.monotonic() + 2 * RENEWAL_SECONDS
    while before is not None and time.monotonic() < end:
        time.sleep(RENEWAL_SECONDS / 10)
        if (now := read_holder(folder)) is not None and now != before:
            return True
    return False


def _get_object(file: UPath) -> bytes:
    """Read an object in one GET: opening it would ask for its ETag first, which each renewal changes."""
    content: bytes = file.fs.cat_file(file.path)
    return content


class Lease(Held):
    """A lock on object storage: an object that its holder rewrites every `RENEWAL_SECONDS`.

    The object is created by a conditional PUT, which only one of two processes wins. A process that finds the
    object watches it. If it changes, its holder is alive. If it stays the same for `LEASE_SECONDS`, its
    holder is taken for dead and the lease is taken over. The watching process alone measures the time: clocks
    of two machines are never compared. A holder that was cut off from the storage for so long finds another
    holder's token when it comes back, and stops.
    """

    def __init__(self, file: UPath) -> None:
        self.file, self.token = file, uuid.uuid4().hex
        super().__init__()

    def _acquire(self) -> None:
        if not self._create():
            self._take_over()

    def _give_back(self) -> None:
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

    def _show_life(self) -> bool:
        with suppress(Exception):  # unavailable for a moment; who watches waits for several renewals
            if not self._is_mine():
                return self._stop(f"{self.file}: another command took it over")
            write_bytes(self.file, self._content())
        return True

    def _content(self) -> bytes:
        return self.holder.sign_of_life(token=self.token, renewal=uuid.uuid4().hex).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(_get_object(self.file))
        except FileNotFoundError:
            return None
        return content

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and found["token"] == self.token
