"""SIGINT and SIGTERM end a command in seconds, with one line and the exit codes 130 and 143, in every stage.

The first signal raises `Interrupted` in the main thread: locks are released and files closed on the way out.
Further signals change nothing, and after `LAST_SECONDS` the process ends wherever it is: a library may wait
for its threads. A signal that meets the main thread just before a call that blocks, or that another thread
gets, does not end that call: a thread sends the signal to the main thread again until its handler has run.
The process ends without Python's exit handlers, in which Ray's threads may abort it; a Ray cluster that the
command started is killed with it, and on another cluster the command's actors end.

A command that has lost the lock of its run folder (another command took the lease, or the folder or its lock
was deleted) ends in the same way, with exit code 2.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

from bdpo.storage.lease import LOST

T = TypeVar("T")

LAST_SECONDS = 8.0
"""How long a command that was interrupted may take to release what it holds."""

AGAIN_SECONDS = 0.2
"""How long a signal may go without its handler before it is sent again."""

_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupted(KeyboardInterrupt):
    """A signal ended the command."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Interrupted`; when the block ends by it, so does the process."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    seen: list[int] = []  # the exit code

    def announce(signum: int) -> None:
        seen.append(2 if LOST.is_set() else 128 + signum)  # a lost lock has been reported
        if not LOST.is_set():
            print(f"{_WORDS[signum]}: the same command resumes here", file=sys.stderr, flush=True)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if not seen:
            announce(signum)
            timer = threading.Timer(LAST_SECONDS, _end, seen)
            timer.daemon = True
            timer.start()
            raise Interrupted(signum)

    def insist(signum: int) -> None:
        for _ in range(round(LAST_SECONDS / AGAIN_SECONDS)):
            time.sleep(AGAIN_SECONDS)
            if seen or signal.getsignal(signum) is not interrupt:  # it is done, or a library's turn
                return
            signal.pthread_kill(cast(int, threading.main_thread().ident), signum)
        announce(signum)
        _end(seen[0])

    with _watching_signals(insist):
        before = {signum: signal.signal(signum, interrupt) for signum in _WORDS}
        try:
            yield
        finally:
            if seen:  # whatever the exception was turned into on the way here
                _end(seen[0])
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def _watching_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Call a function, in a thread, with each of our signals that this process gets."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while received := os.read(reading, 1):
            if received[0] in _WORDS:
                call(received[0])
        os.close(reading)

    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _kill_children()
    os._exit(code)


def _kill_children() -> None:
    """End what this process started: a Ray cluster of its own, whose agents may outlive their raylet.

    Where the command joined a cluster, its processes are not children of this one.
    """
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def keep_handlers(call: Callable[[], T]) -> T:
    """Call what sets a handler of its own for SIGTERM, and put ours back."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    before = {signum: signal.getsignal(signum) for signum in _WORDS}
    try:
        return call()
    except SystemExit as end:  # so does Ray's handler end the driver
        if end.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def in_thread(call: Callable[[], T], unless: Future[NoReturn] | None = None) -> T:
    """Call what would set handlers of its own in the main thread; a signal ends the wait for it.

    So does `unless`, whose exception is raised then; the thread is left to end with the process.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    futures: list[Future[Any]] = [outcome] if unless is None else [outcome, unless]
    wait(futures, return_when=FIRST_COMPLETED)
    return outcome.result() if unless is None or outcome.done() else unless.result()
