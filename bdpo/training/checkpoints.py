"""Checkpoints of a training: every worker writes its own part and vouches for it.

    state/*.pt             weights, optimizer, scheduler: DeepSpeed's files of this worker
    rng_state_<rank>.pth   its random number generators
    part-<rank>.json       the cursor, and size and SHA-256 of each of its files; written last

A checkpoint is whole if the parts of all its workers are there and every file is as its part says. That
can be seen from the folder alone, whatever was killed while it was written, copied or deleted. Sizes tell
a truncated one at once; hashes are compared before anything is loaded, each worker looking at its part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from bdpo.errors import UserError
from bdpo.storage.digests import sha256
from bdpo.storage.paths import StoragePath, read_text, write_text
from bdpo.storage.run_dir import RunDir

Metrics = dict[str, float]

# Gets a folder with this worker's part and the metrics of its step; the folder is then its to remove.
Report = Callable[[Path, Metrics], None]


class Checkpoint(Protocol):
    """A checkpoint in storage; `ray.train.Checkpoint` is one."""

    path: str

    def as_directory(self) -> AbstractContextManager[str]:
        """Its folder on this machine."""


class Reported(Protocol):
    """A checkpoint that counts, and the metrics of its step; `ray.train.ReportedCheckpoint` is one."""

    checkpoint: Checkpoint
    metrics: Metrics


@dataclass(frozen=True)
class TrainProgress:
    """Where a training stands. The order of the pairs is a function of the seed and `step` alone."""

    step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0


class Staging:
    """Local folders in which this worker's parts are written, before they are copied to storage.

    A killed process cannot remove its own, so the next one of the same run and rank does.
    """

    def __init__(self, run: RunDir) -> None:
        run_digest = hashlib.sha256(str(run.root).encode()).hexdigest()[:16]
        self.prefix = f"bdpo-{run_digest}-{dist.get_rank()}-"
        for left_over in Path(tempfile.gettempdir()).glob(f"{self.prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def new(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(prefix=self.prefix))


def save_checkpoint(
    engine: Any, cursor: TrainProgress, metrics: Metrics, staging: Staging, report: Report
) -> None:
    """Write this worker's part of the engine's state and hand it to `report`; every worker must call this.

    Raises:
        UserError: the disk is full.
    """
    folder = staging.new()
    try:
        # What LoRA leaves frozen is in the base model.
        engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)
        torch.save(_rng_state(), folder / f"rng_state_{dist.get_rank()}.pth")
        part = {
            "workers": dist.get_world_size(),
            **asdict(cursor),
            "metrics": metrics,
            "files": _files(folder),
        }
        write_text(folder / f"part-{dist.get_rank()}.json", json.dumps(part))
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        # torch.save turns what the system says into "[enforce fail at inline_container.cc:672]".
        if isinstance(error, OSError) or "inline_container" in str(error):
            raise UserError(
                f"{folder}: the checkpoint of step {cursor.step} cannot be written (is the disk full?); "
                "make room or set TMPDIR, and the same command goes on from the checkpoint before"
            ) from error
        raise
    dist.barrier()
    report(folder, metrics)


def load_first_intact(
    engine: Any, checkpoints: Sequence[Checkpoint]
) -> tuple[TrainProgress, str, dict[str, str]]:
    """Restore the engine, and the generators, from the first of `checkpoints` that is whole.

    Every worker must call this with the same checkpoints. Returns the cursor, the name of the checkpoint,
    and those before it that are not whole, each with what is wrong.

    Raises:
        UserError: none is whole, or the checkpoint is of another number of workers.
    """
    damaged: dict[str, str] = {}
    for checkpoint in checkpoints:
        name = checkpoint.path.rstrip("/").rpartition("/")[2]
        with checkpoint.as_directory() as folder:
            found: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, _damage(Path(folder), dist.get_rank()))
            wrong = next(filter(None, found), None)
            if wrong is None:
                return _load(engine, Path(folder)), name, damaged
            damaged[name] = wrong
    raise no_intact_checkpoint(damaged)


def no_intact_checkpoint(damaged: dict[str, str]) -> UserError:
    """A begun training never silently starts from zero: what to say instead."""
    wrong = "; ".join(f"{name}: {what}" for name, what in damaged.items()) or "all are gone"
    return UserError(f"no checkpoint to go on from ({wrong}); restore one, or fresh=true starts over")


def read_part(folder: StoragePath) -> dict[str, Any]:
    """What the first worker wrote about a checkpoint: cursor, workers, metrics."""
    part: dict[str, Any] = json.loads(read_text(folder / "part-0.json"))
    return part


def checkpoint_defect(folder: StoragePath) -> str | None:
    """What is missing of a checkpoint, or shorter than it was written; None if nothing is."""
    try:
        workers = read_part(folder)["workers"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # other errors are of the storage
        return "part-0.json is missing or damaged"
    return next(filter(None, (_damage(folder, rank, hashes=False) for rank in range(workers))), None)


def _damage(folder: StoragePath, rank: int, hashes: bool = True) -> str | None:
    """What is wrong with the part of one worker; None if it is as it was written."""
    name = f"part-{rank}.json"
    try:
        if not (folder / name).exists() and rank >= read_part(folder)["workers"]:
            return None  # `_load` says that the number of workers is another one
        for name, file in json.loads(read_text(folder / f"part-{rank}.json"))["files"].items():
            if (folder / name).stat().st_size != file["size"]:
                return f"{name} is truncated"
            if hashes and sha256(folder / name) != file["sha256"]:
                return f"{name} is damaged"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return f"{name} is missing or damaged"
    return None


def _load(engine: Any, folder: Path) -> TrainProgress:
    part, workers = read_part(folder), dist.get_world_size()
    if part["workers"] != workers:
        raise UserError(
            f"{folder}: a checkpoint of {part['workers']} workers cannot be resumed by {workers}; "
            f"set train.workers={part['workers']}, or fresh=true to start over"
        )
    if engine.zero_nvme_offload_optimizer():  # DeepSpeed 0.19 gives back the weights, and new moments
        raise UserError(
            "train.offload=nvme: DeepSpeed cannot restore the optimizer from a checkpoint; "
            "fresh=true starts over, with train.offload=cpu a training can go on"
        )
    all_trained = all(parameter.requires_grad for parameter in engine.module.parameters())
    engine.load_checkpoint(str(folder), tag="state", load_module_strict=all_trained)
    _set_rng_state(torch.load(folder / f"rng_state_{dist.get_rank()}.pth", weights_only=True))
    return TrainProgress(part["step"], part["epoch"], part["num_tokens"])


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }


def _rng_state() -> dict[str, torch.Tensor]:
    """What dropout draws from, that of an adapter for one; the order of the pairs draws from nothing."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"torch": torch.get_rng_state(), **cuda}


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
