"""What starts the workers of a training, and what it is told and asked by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

Metrics = dict[str, float]


class Phase(StrEnum):
    """What a worker does at a time; how long it may take is known from earlier ones of the same phase."""

    START = "the start of the training"
    STEP = "an optimizer step"
    REESTIMATION = "a part of the estimation of mutual information"
    EVALUATION = "an evaluation on held-out pairs"
    CHECKPOINT = "the copy of a checkpoint"
    WRITING = "the wait for a checkpoint to be written"
    EXPORT = "the export of the model"
    DECISION = "the wait for a decision"


class Checkpoint(Protocol):
    """A checkpoint in storage; `ray.train.Checkpoint` is one."""

    path: str

    def as_directory(self) -> AbstractContextManager[str]:
        """A local folder with the checkpoint's files."""


class Reported(Protocol):
    """A committed checkpoint and the metrics of its step; `ray.train.ReportedCheckpoint` is one."""

    checkpoint: Checkpoint
    metrics: Metrics


@dataclass(frozen=True)
class Launcher:
    """What started the workers: it knows where checkpoints go, and may watch that the work goes forward.

    `report` receives a folder with this worker's part of a checkpoint, which it removes, and the metrics of
    its step. `reported` waits until everything that was reported is committed, and returns the checkpoints
    that are kept. `begins` is called when this worker begins a phase, with what it did before completed.
    """

    reported: Callable[[], Sequence[Reported]]
    report: Callable[[Path, Metrics], None]
    begins: Callable[[Phase], None] = lambda phase: None
