"""What Ray Train does not do by itself so that a training survives any kill and no failure is tried in vain.

Ray lists the checkpoints that it has committed in a file of its own, and refuses to start if one of them is
gone or the file was cut by a kill. What is in the folder decides here: the list is written anew from the
checkpoints that are whole.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import ControllerError, TrainingFailedError, UserCallback

from bdpo.config import TrainConfig
from bdpo.errors import UserError
from bdpo.storage.manifests import read_manifest, write_manifest
from bdpo.storage.paths import StoragePath, discard, sorted_glob, write_text
from bdpo.training.checkpoints import checkpoint_defect, no_intact_checkpoint, read_part

# Every retry would meet these again: a guard of the training, or a full disk.
FINAL = (UserError, FloatingPointError)


class Recovery(UserCallback):
    """Runs beside Ray's controller: notes the first commit, and ends a run that no retry can help."""

    def __init__(self, begun_file: StoragePath) -> None:
        self.begun_file = begun_file

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """A checkpoint is committed: from now on a training without any is not a new one."""
        begun = read_manifest(self.begun_file)
        if begun and checkpoint:
            step = metrics[0]["step"]
            write_manifest(self.begun_file, **{**begun, "committed": step})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise what ends the run: Ray does not retry what a callback raises."""
        for error in worker_exceptions.values():
            if isinstance(error, FINAL):
                raise error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    "the disk is full: a checkpoint cannot be kept; make room, and the same command goes on"
                )


def final_cause(error: TrainingFailedError) -> Exception:
    """The error that ended the run, out of Ray's wrapping if the callback above raised it."""
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return cause if isinstance(cause, FINAL) else error


def rebuild_checkpoint_list(
    folder: StoragePath, committed: int | None, train: TrainConfig
) -> tuple[int, dict[str, str]]:
    """Make Ray's list of the checkpoints in `folder` that of those which are whole; the others are removed.

    Returns the number of those that are whole, and the names of the others, with what is wrong with each.
    `committed` is the step of a checkpoint that was there once.

    Raises:
        UserError: none is whole, though one was there.
    """
    wrong = incomplete_checkpoints(folder)
    whole = [file for file in _checkpoints(folder) if file.name not in wrong]
    if committed and not whole:
        raise no_intact_checkpoint(wrong)
    snapshot = folder / "checkpoint_manager_snapshot.json"
    if whole:
        write_text(
            snapshot, json.dumps(_ray_list({file.name: read_part(file)["metrics"] for file in whole}, train))
        )
    else:
        discard(snapshot)
    discard(*(folder / name for name in wrong))
    return len(whole), wrong


def remove_uncommitted(folder: StoragePath, reported: Sequence[Any]) -> None:
    """Remove what a worker that died had copied to storage before Ray could commit it, whole or not.

    Training goes on from `reported` and shortens its log to that: a later start that found a newer
    checkpoint in `folder` would go on from steps which are no longer in the log.
    """
    kept = {Path(each.checkpoint.path).name for each in reported}
    discard(*(file for file in _checkpoints(folder) if file.name not in kept))


def incomplete_checkpoints(folder: StoragePath) -> dict[str, str]:
    """Names of the checkpoints in `folder` that are not whole, with what is wrong with each."""
    return {file.name: why for file in _checkpoints(folder) if (why := checkpoint_defect(file))}


def _checkpoints(folder: StoragePath) -> list[StoragePath]:
    return [file for file in sorted_glob(folder, "checkpoint_*") if file.is_dir()]


def _ray_list(metrics: dict[str, dict[str, Any]], train: TrainConfig) -> dict[str, Any]:
    """What Ray's checkpoint manager reads back when a run of the same name starts (Ray 2.60).

    Its order is that of the score, worst first, if there is one; else the oldest is first.
    """
    metric, sign = train.best_metric or "step", -1 if train.best_metric and not train.best_is_greatest else 1
    names = sorted(metrics, key=lambda name: (sign * metrics[name][metric], metrics[name]["step"], name))
    by_step = sorted(metrics, key=lambda name: (metrics[name]["step"], name))
    results = {name: {"checkpoint_dir_name": name, "metrics": metrics[name]} for name in names}
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": list(results.values()),
        "checkpoint_report_indices": [by_step.index(name) for name in names],
        "latest_checkpoint_result": results[by_step[-1]],
        "current_report_index": len(names),
        "pending_training_results": [],
        "pending_validation_specs": [],
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
