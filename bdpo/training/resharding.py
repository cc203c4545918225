"""A checkpoint of N workers, cut anew for M workers.

The optimizer's state (weights in float32, first and second moments) is partitioned over the workers:

    ZeRO 0       not at all: one file, which any number of workers loads as it is
    ZeRO 1, 2    the parameters of a group are one flat tensor, which is cut into N parts of equal length
    ZeRO 3       each parameter is cut into N parts of ceil(numel / N); a worker's parts are one flat tensor

Parts are padded at their end. Here each of M workers reads its share of the N parts, writes the files that it
would have written itself, and loads these as always. So nothing of the engine's state is set by hand. The
names and keys of DeepSpeed's files are in `bdpo.models.deepspeed_internals`;
`tests/training/test_resharding.py` compares with undisturbed trainings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bdpo.models.deepspeed_internals import (
    GROUP_MOMENTS,
    GROUP_WEIGHTS,
    MODEL_FILE,
    MODEL_FILE_OF_WORKER,
    OPTIMIZER,
    OPTIMIZER_FILE,
    PARAMETER_WEIGHTS,
    SHAPES,
    WORKERS,
    parameter_shapes,
    partition_sizes,
)

STATE = "state"
"""The folder of DeepSpeed's files in a checkpoint: what DeepSpeed calls its tag."""

Shapes = Sequence[Mapping[str, torch.Size]]
"""The parameters of each group of the optimizer, in order: name -> shape."""


@dataclass(frozen=True)
class Share:
    """Worker `rank` of `workers`."""

    rank: int
    workers: int

    def of(self, flat: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """This worker's part of a flat tensor, padded with zeros to `length`; by default ceil(n / M)."""
        if length is None:
            length = -(-flat.numel() // self.workers)
        part = flat[self.rank * length : (self.rank + 1) * length]
        return torch.cat([part, part.new_zeros(length - part.numel())])


def load_resharded(engine: Any, folder: Path, workers: int, strict: bool) -> Mapping[str, Any]:
    """Load a checkpoint of another number of `workers` into the engine; every worker must call this.

    Returns what was saved beside the model's state.

    Each worker reads all files of the optimizer, of which it keeps its share, and writes that share to its
    temporary folder; with ZeRO 1 and 2 the model's weights as well.
    """
    further: Mapping[str, Any]
    if engine.zero_optimization_stage() == 0:
        _, further = engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=strict)
        return further
    with tempfile.TemporaryDirectory(prefix="bdpo-resharded-") as scratch:
        state = Path(scratch) / STATE
        state.mkdir()
        share = Share(dist.get_rank(), dist.get_world_size())
        _write_share(engine, folder / STATE, state, workers, share)
        _, further = engine.load_checkpoint(scratch, tag=STATE, load_module_strict=strict)
        return further


def _write_share(engine: Any, old: Path, new: Path, workers: int, share: Share) -> None:
    partitions_weights = engine.zero_optimization_stage() == 3
    model_file = MODEL_FILE_OF_WORKER if partitions_weights else MODEL_FILE
    model = _read(old / model_file.format(0))
    torch.save({**model, WORKERS: share.workers}, new / model_file.format(share.rank))
    files = [next(old.glob("*" + OPTIMIZER_FILE.format(rank))) for rank in range(workers)]
    states = [_read(file) for file in files]
    parts = [state[OPTIMIZER] for state in states]
    if partitions_weights:
        groups = engine.optimizer.state_dict()[OPTIMIZER]["param_groups"]
        shapes = parameter_shapes(engine)
        optimizer = reshard_parameters(parts, model[SHAPES], shapes, groups, share)
    else:
        sizes = [sum(map(prod, group.values())) for group in model[SHAPES]]
        optimizer = reshard_groups(parts, sizes, partition_sizes(engine.optimizer), share)
    name = files[0].name.replace(OPTIMIZER_FILE.format(0), OPTIMIZER_FILE.format(share.rank))
    torch.save({**states[0], OPTIMIZER: optimizer}, new / name)


def reshard_groups(
    parts: Sequence[Mapping[str, Any]], sizes: Sequence[int], lengths: Sequence[int], share: Share
) -> dict[str, object]:
    """The optimizer's state of one worker under ZeRO 1 or 2, from `parts`, those of all workers before.

    A group has `sizes` elements without padding, and this worker's partition `lengths` elements.
    """

    def cut(group: int, flats: Sequence[torch.Tensor]) -> torch.Tensor:
        return share.of(torch.cat(list(flats))[: sizes[group]], lengths[group])

    base = parts[0][GROUP_MOMENTS]
    state = {
        group: {
            key: cut(group, [part[GROUP_MOMENTS]["state"][group][key] for part in parts])
            if value.dim()
            else value
            for key, value in base["state"][group].items()
        }
        for group in range(len(sizes))
    }
    weights = [cut(group, [part[GROUP_WEIGHTS][group] for part in parts]) for group in range(len(sizes))]
    return {**parts[0], GROUP_WEIGHTS: weights, GROUP_MOMENTS: {**base, "state": state}}


def reshard_parameters(
    parts: Sequence[Mapping[str, Any]],
    before: Shapes,
    now: Shapes,
    param_groups: Sequence[Mapping[str, Any]],
    share: Share,
) -> dict[str, object]:
    """The optimizer's state of one worker under ZeRO 3, from `parts`, those of all workers before.

    Large groups are split into sub-groups of a limited size per worker, so that the same parameters may be
    `before` in other sub-groups than `now`; `param_groups` lists these for the optimizer.
    """
    places: dict[str, tuple[int, int, int]] = {}  # name -> group, offset in its flat tensor, elements of all
    for group, shapes in enumerate(before):
        offset = 0
        for name, shape in shapes.items():
            places[name] = group, offset, prod(shape)
            offset += -(-prod(shape) // len(parts))

    def cut(name: str, flats: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        group, offset, size = places[name]
        length = -(-size // len(parts))
        return share.of(torch.cat([flat[group][offset : offset + length] for flat in flats])[:size])

    def cut_group(names: Mapping[str, Any], flats: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        return torch.cat([cut(name, flats) for name in names])

    base = [part[OPTIMIZER] for part in parts]
    scalars = {key: value for key, value in base[0]["state"][0].items() if not value.dim()}
    moments = {
        key: [[each["state"][group][key] for group in range(len(before))] for each in base]
        for key in base[0]["state"][0].keys() - scalars.keys()
    }
    state = {  # the optimizer counts its steps in place: no two groups may share a tensor
        group: {key: value.clone() for key, value in scalars.items()}
        | {key: cut_group(names, flats) for key, flats in moments.items()}
        for group, names in enumerate(now)
    }
    groups = [
        {**old, "params": new["params"]}
        for old, new in zip(base[0]["param_groups"], param_groups, strict=True)
    ]
    weights = [cut_group(names, [part[PARAMETER_WEIGHTS] for part in parts]) for names in now]
    return {
        **parts[0],
        PARAMETER_WEIGHTS: weights,
        OPTIMIZER: {"state": state, "param_groups": groups},
    }


def _read(file: Path) -> Any:
    """A file of DeepSpeed; tensors are read from the disk where they are used. Its hash was compared."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
