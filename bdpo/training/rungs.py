"""Rungs: steps at which a training exports its model, waits for a decision, and then resumes or ends.

The workers of the training and the process that evaluates the model communicate by files in the run folder.
The files outlive both sides: a training that was killed and started again finds the decisions that were made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bdpo.storage.paths import StoragePath, sorted_glob, write_text


@dataclass(frozen=True)
class Rungs:
    """The rungs of one training: it waits after each of `steps` optimizer steps."""

    folder: StoragePath
    steps: tuple[int, ...]

    @property
    def poll_seconds(self) -> float:
        """How often to look for a file; on object storage each look is a request."""
        return 0.1 if isinstance(self.folder, Path) else 1.0

    def exported(self, step: int) -> bool:
        """Whether the model after `step` steps is exported; it stays there until the training resumes."""
        return self._file(step, "exported").exists()

    def mark_exported(self, step: int) -> None:
        """Record that the model after `step` steps is exported."""
        write_text(self._file(step, "exported"), "")

    def withdraw_export(self) -> None:
        """Record that the exported model was lost: the training has to export it again."""
        for file in sorted_glob(self.folder, "*.exported"):
            file.unlink()

    def wait(self, step: int) -> bool:
        """Block until there is a decision: True if training resumes. Every worker must call this.

        There is no limit: the evaluation on the other side takes as long as it takes, and whoever runs both
        (`tune.trial`) ends the training if the evaluation fails.
        """
        while not (promoted := self._file(step, "go").exists()) and not (self.folder / "stop").exists():
            time.sleep(self.poll_seconds)
        return promoted

    def promote(self, step: int) -> None:
        """Let the training resume after `step`, now and whenever it reaches that step again."""
        write_text(self._file(step, "go"), "")

    def stop(self) -> None:
        """Let the training end where it waits."""
        write_text(self.folder / "stop", "")

    def clear_stop(self) -> None:
        """Remove the stop of an earlier training, which does not concern the one that begins."""
        (self.folder / "stop").unlink(missing_ok=True)

    def _file(self, step: int, what: str) -> StoragePath:
        return self.folder / f"{step:09d}.{what}"
