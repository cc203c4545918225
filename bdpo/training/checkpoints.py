"""Checkpoints of a training: every worker writes its own part, and a list of the files in it.

    state/*.pt             weights, optimizer, scheduler: DeepSpeed's files of this worker
    rng_state_<rank>.pth   the worker's random number generators
    part-<rank>.json       progress, metrics, and size and SHA-256 of each of the worker's files; written last

A checkpoint is intact if the part files of all its workers are there and undamaged, and every file is as its
part file records. The folder alone decides that, whatever was killed while it was written, copied or deleted:
no list elsewhere has to agree with it. Sizes show a truncated file at once and are checked before a training
starts. Hashes are compared before anything is loaded, each worker reading its own part, so that the
check costs each node only what it is about to read anyway.
"""

from __future__ import annotations

import hashlib
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
from bdpo.storage.paths import StoragePath, read_bytes, write_text
from bdpo.storage.run_dir import RunDir
from bdpo.storage.sealed import sealed, unsealed
from bdpo.training.resharding import load_resharded

Metrics = dict[str, float]

# Receives a folder with this worker's part of a checkpoint, and the metrics of its step; removes the folder.
Report = Callable[[Path, Metrics], None]


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
class TrainProgress:
    """How far a training has come. The order of the pairs is a function of the seed and `step` alone."""

    step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True)
class CheckpointPart:
    """One worker's account of a checkpoint: `files` holds `size` (bytes) and `sha256` by relative name."""

    workers: int
    progress: TrainProgress
    metrics: Metrics
    files: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        """The content of `part-<rank>.json`, with a digest of itself."""
        content = {**asdict(self), **asdict(self.progress)}
        del content["progress"]
        return sealed(content)

    @classmethod
    def read(cls, folder: StoragePath, rank: int) -> CheckpointPart:
        """Read `part-<rank>.json` of a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged.
        """
        content = unsealed(read_bytes(folder / f"part-{rank}.json"))
        try:
            progress = TrainProgress(*(content[name] for name in ("step", "epoch", "num_tokens")))
            return cls(content["workers"], progress, content["metrics"], content["files"])
        except KeyError as error:
            raise ValueError(f"no key {error}") from None


class Staging:
    """Local folders in which this worker's parts are written before they are copied to storage.

    A killed process cannot remove its own folders, so the next process of the same run and rank does.
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
    engine: Any, progress: TrainProgress, metrics: Metrics, staging: Staging, report: Report
) -> None:
    """Write this worker's part of the engine's state and pass it to `report`; every worker must call this.

    Raises:
        UserError: the disk is full.
    """
    folder = staging.new()
    try:
        # The parameters that LoRA freezes are in the base model already.
        engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)
        torch.save(_rng_state(), folder / f"rng_state_{dist.get_rank()}.pth")
        part = CheckpointPart(dist.get_world_size(), progress, metrics, _files(folder))
        write_text(folder / f"part-{dist.get_rank()}.json", part.to_json())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        # torch.save reports a full disk as RuntimeError("[enforce fail at inline_container.cc:672]").
        if isinstance(error, OSError) or "inline_container" in str(error):
            raise UserError(
                f"{folder}: the checkpoint of step {progress.step} cannot be written (is the disk full?); "
                "make room or set TMPDIR, and the same command resumes from the previous checkpoint"
            ) from error
        raise
    # A checkpoint of which one worker failed to write its part must not be reported by the others.
    dist.barrier()
    report(folder, metrics)


def load_first_intact(
    engine: Any, checkpoints: Sequence[Checkpoint]
) -> tuple[TrainProgress, str, dict[str, str]]:
    """Restore the engine and the random number generators from the first intact one of `checkpoints`.

    Every worker must call this with the same checkpoints. Returns the progress, the name of the checkpoint,
    and the checkpoints before it that are damaged, each with its defect.

    Raises:
        UserError: no checkpoint is intact.
    """
    damaged: dict[str, str] = {}
    for checkpoint in checkpoints:
        name = checkpoint.path.rstrip("/").rpartition("/")[2]
        with checkpoint.as_directory() as folder:
            # Each worker judges its own part, or its share of them, but all must load the same checkpoint:
            # one defect anywhere makes every worker try the next one.
            found: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(found, _defect_of_share(Path(folder)))
            defect = next(filter(None, found), None)
            if defect is None:
                return _load(engine, Path(folder)), name, damaged
            damaged[name] = defect
    raise no_intact_checkpoint(damaged)


def no_intact_checkpoint(damaged: dict[str, str]) -> UserError:
    """The error for a training that had begun and has no intact checkpoint: it never restarts silently."""
    defects = "; ".join(f"{name}: {defect}" for name, defect in damaged.items()) or "all are gone"
    return UserError(
        f"there is no intact checkpoint to resume from ({defects}); restore one, or fresh=true starts over"
    )


def checkpoint_defect(folder: StoragePath) -> str | None:
    """What is missing, truncated or damaged in a checkpoint, None if nothing is; file hashes are not read."""
    try:
        workers = CheckpointPart.read(folder, 0).workers
    except (FileNotFoundError, ValueError):  # any other error is of the storage
        return "part-0.json is missing or damaged"
    return next(filter(None, (part_defect(folder, rank, hashes=False) for rank in range(workers))), None)


def part_defect(folder: StoragePath, rank: int, hashes: bool = True) -> str | None:
    """What is wrong with the part of one worker, None if it is as it was written."""
    name = f"part-{rank}.json"
    try:
        first = CheckpointPart.read(folder, 0)
        part = CheckpointPart.read(folder, rank)
        if (part.workers, part.progress) != (first.workers, first.progress):
            return f"{name} is of another checkpoint"
        for name, file in part.files.items():
            if (folder / name).stat().st_size != file["size"]:
                return f"{name} is truncated"
            if hashes and sha256(folder / name) != file["sha256"]:
                return f"{name} is damaged"
    except (FileNotFoundError, ValueError):
        return f"{name} is missing or damaged"
    return None


def _defect_of_share(folder: Path) -> str | None:
    """What is wrong with the parts that this worker checks: of its own rank, and each M further."""
    try:
        ranks = range(dist.get_rank(), CheckpointPart.read(folder, 0).workers, dist.get_world_size())
    except (FileNotFoundError, ValueError):
        return "part-0.json is missing or damaged"
    return next(filter(None, (part_defect(folder, rank) for rank in ranks)), None)


def _load(engine: Any, folder: Path) -> TrainProgress:
    part, workers = CheckpointPart.read(folder, 0), dist.get_world_size()
    if engine.zero_nvme_offload_optimizer():  # DeepSpeed 0.19 restores the weights, but not the moments
        raise UserError(
            "train.offload=nvme: DeepSpeed cannot restore the optimizer from a checkpoint; "
            "fresh=true starts over, and with train.offload=cpu a training can be resumed"
        )
    all_trained = all(parameter.requires_grad for parameter in engine.module.parameters())
    if part.workers != workers:  # the generators are seeded anew at each step, whatever their state
        load_resharded(engine, folder, part.workers, all_trained)
        return part.progress
    engine.load_checkpoint(str(folder), tag="state", load_module_strict=all_trained)
    _set_rng_state(torch.load(folder / f"rng_state_{dist.get_rank()}.pth", weights_only=True))
    return part.progress


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }


def _rng_state() -> dict[str, torch.Tensor]:
    """The generators that the dropout of an adapter draws from; the order of the pairs uses none of them."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"torch": torch.get_rng_state(), **cuda}


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
