"""Rungs: where a training hands its model over, waits for word, and goes on or ends.

Its workers and whoever evaluates talk by files in the run folder: those outlive both sides, and a training
that was killed and begun again finds what was said.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bdpo.storage.paths import StoragePath, sorted_glob, write_text


@dataclass(frozen=True)
class Rungs:
    """The rungs of one training: after each of `steps` optimizer steps it stands still."""

    folder: StoragePath
    steps: tuple[int, ...]

    @property
    def poll_seconds(self) -> float:
        """How often to look for a file; on object storage each look is a request."""
        return 0.1 if isinstance(self.folder, Path) else 1.0

    def exported(self, step: int) -> bool:
        """Is the model after `step` steps in its place? It stays there until training goes on."""
        return self._file(step, "exported").exists()

    def mark_exported(self, step: int) -> None:
        """Say that it is."""
        write_text(self._file(step, "exported"), "")

    def withdraw_export(self) -> None:
        """The model was lost: it is to be written again."""
        for file in sorted_glob(self.folder, "*.exported"):
            file.unlink()

    def wait(self, step: int) -> bool:
        """Called by every worker, until there is word: is training to go on?"""
        while not (go := self._file(step, "go").exists()) and not (self.folder / "stop").exists():
            time.sleep(self.poll_seconds)
        return go

    def promote(self, step: int) -> None:
        """Let training go on from `step`, now and whenever it comes there again."""
        write_text(self._file(step, "go"), "")

    def stop(self) -> None:
        """Let training end where it waits."""
        write_text(self.folder / "stop", "")

    def clear_stop(self) -> None:
        """A training begins: the end of the one before is not its own."""
        (self.folder / "stop").unlink(missing_ok=True)

    def _file(self, step: int, what: str) -> StoragePath:
        return self.folder / f"{step:09d}.{what}"
