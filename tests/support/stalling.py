"""An actor of a pool that stands still at the first attempt of a shard, in one of several ways."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from bdpo.storage.shards import Shard

SHARDS = 6


def stop() -> None:
    """As `kill -STOP` does: no thread of the process runs any more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """As a call does that never returns: the other threads of the process still answer Ray."""
    threading.Event().wait()


def stop_later() -> None:
    """After the shard, while the actor waits for work or begins the next shard."""
    threading.Timer(0.2, stop).start()


class Stalling:
    """Stands still at shard `at` (-1: in its start), once; `folder` records that, and each finished shard."""

    def __init__(self, folder: Path, way: str, at: int, device: str) -> None:
        self.folder, self.way, self.at = folder, way, at
        self._stall(-1)

    def __call__(self, shard: Shard) -> Shard:
        """The shard, noted in the folder."""
        first = int(shard["first"])
        self._stall(first)
        (self.folder / f"{first}.{os.getpid()}").touch()
        time.sleep(0.1)
        return shard

    def _stall(self, here: int) -> None:
        once = self.folder / "stalled"
        if here == self.at and not once.exists():
            once.write_text(str(os.getpid()))
            {"stop": stop, "hang": hang, "stop_later": stop_later}[self.way]()
