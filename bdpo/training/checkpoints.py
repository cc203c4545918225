"""Checkpoints of a training: every worker writes its own part, and a list of the files in it.

    state/*.pt         weights, optimizer, scheduler: DeepSpeed's files of this worker
    part-<rank>.json   progress, metrics, and size and SHA-256 of each of the worker's files; written last

No state of a random number generator is in it: they are seeded anew at each step. `bdpo.training.saving`
writes checkpoints, this module reads them.

A checkpoint is intact if the part files of all its workers are there and undamaged, and every file is as its
part file records. The folder alone decides that, whatever was killed while it was written, copied or deleted:
no list elsewhere has to agree with it. Sizes show a truncated file at once and are checked before a training
starts. Hashes are compared before anything is loaded, each worker reading its own part, so that the
check costs each node only what it is about to read anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bdpo.errors import UserError
from bdpo.storage.digests import sha256
from bdpo.storage.paths import StoragePath, read_bytes
from bdpo.storage.sealed import sealed, unsealed
from bdpo.training.launcher import Checkpoint, Metrics
from bdpo.training.resharding import STATE, load_resharded


@dataclass(frozen=True)
class TrainProgress:
    """How far a training has come. The order of the pairs is a function of the seed and `step` alone."""

    step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back beside the engine's state.

    `further` is what was saved with it; `damaged` are the checkpoints before this one, each with its defect.
    """

    progress: TrainProgress
    further: Mapping[str, Any]
    checkpoint: str
    damaged: dict[str, str]


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


def load_first_intact(engine: Any, checkpoints: Sequence[Checkpoint]) -> Restored:
    """Restore the engine from the first intact one of `checkpoints`.

    Every worker must call this with the same checkpoints.

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
                return Restored(*_load(engine, Path(folder)), name, damaged)
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


def _load(engine: Any, folder: Path) -> tuple[TrainProgress, Mapping[str, Any]]:
    part, workers = CheckpointPart.read(folder, 0), dist.get_world_size()
    if engine.zero_nvme_offload_optimizer():  # DeepSpeed 0.19 restores the weights, but not the moments
        raise UserError(
            "train.offload=nvme: DeepSpeed cannot restore the optimizer from a checkpoint; "
            "fresh=true starts over, and with train.offload=cpu a training can be resumed"
        )
    all_trained = all(parameter.requires_grad for parameter in engine.module.parameters())
    if part.workers != workers:
        further = load_resharded(engine, folder, part.workers, all_trained)
    else:
        _, further = engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=all_trained)
    return part.progress, further
