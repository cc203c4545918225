"""Recovery of a training: what Ray Train lacks so that a training survives any kill, and no retry is in vain.

Ray records the checkpoints that it has committed in a file of its own, and refuses to start if one of them
is gone or a kill cut the file. Here the folder decides: before each start the record is written anew from the
checkpoints that are intact.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train import ControllerError, TrainingFailedError, UserCallback

from bdpo.config import TrainConfig
from bdpo.errors import UserError
from bdpo.storage.manifests import read_manifest, write_manifest
from bdpo.storage.paths import StoragePath, discard, sorted_glob, write_text
from bdpo.training.checkpoints import CheckpointPart, checkpoint_defect, no_intact_checkpoint
from pipelines.runtime.ray_internals import CHECKPOINT_LIST, checkpoint_list

# Errors that every retry would meet again: a check of the training failed, or the disk is full.
NOT_RETRIED = (UserError, FloatingPointError)


class Recovery(UserCallback):
    """Callback in Ray's controller: records the last commit, and ends a run that no retry can help."""

    def __init__(self, begun_file: StoragePath) -> None:
        self.begun_file = begun_file

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """A checkpoint is committed: from now on a training without checkpoints has lost them."""
        begun = read_manifest(self.begun_file)
        if begun is not None and checkpoint:
            step = metrics[0]["step"]
            write_manifest(self.begun_file, begun.fingerprint, **{**begun, "committed": step})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the error that ends the run: Ray does not retry after an exception of a callback."""
        for error in worker_exceptions.values():
            if isinstance(error, NOT_RETRIED):
                raise error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    "the disk is full: a checkpoint cannot be kept; make room, and the same command resumes"
                )


def final_cause(error: TrainingFailedError) -> Exception:
    """The error that ended the run, without Ray's wrapping if `Recovery` raised it."""
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return cause if isinstance(cause, NOT_RETRIED) else error


def rebuild_checkpoint_list(
    folder: StoragePath, committed: int | None, train: TrainConfig
) -> tuple[int, dict[str, str]]:
    """Write Ray's record of the checkpoints in `folder` anew from the intact ones, and remove the others.

    Returns the number of intact checkpoints, and the defect of each other one by name. `committed` is the
    step of the last checkpoint that was committed, None if none was.

    Raises:
        UserError: no checkpoint is intact, though one was committed.
    """
    defects = incomplete_checkpoints(folder)
    intact = [file for file in _checkpoints(folder) if file.name not in defects]
    if committed and not intact:
        raise no_intact_checkpoint(defects)
    if intact:
        metrics = {file.name: CheckpointPart.read(file, 0).metrics for file in intact}
        write_text(folder / CHECKPOINT_LIST, checkpoint_list(metrics, train))
    else:
        discard(folder / CHECKPOINT_LIST)
    discard(*(folder / name for name in defects))
    return len(intact), defects


def remove_uncommitted(folder: StoragePath, reported: Sequence[Any]) -> None:
    """Remove checkpoints that a worker copied to storage and that Ray did not commit before the worker died.

    They may be intact, but the training resumes from one of `reported` and shortens its log to that step. A
    later start that found a newer checkpoint in `folder` would resume after steps that the log lacks.
    """
    kept = {Path(each.checkpoint.path).name for each in reported}
    discard(*(file for file in _checkpoints(folder) if file.name not in kept))


def incomplete_checkpoints(folder: StoragePath) -> dict[str, str]:
    """Names of the checkpoints in `folder` that are not intact, each with its defect."""
    return {file.name: defect for file in _checkpoints(folder) if (defect := checkpoint_defect(file))}


def _checkpoints(folder: StoragePath) -> list[StoragePath]:
    return [file for file in sorted_glob(folder, "checkpoint_*") if file.is_dir()]
