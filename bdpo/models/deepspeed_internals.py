"""Everything that depends on DeepSpeed beyond its documented interface, tested with DeepSpeed 0.19.8.

`pyproject.toml` admits the versions that were tested and no later minor version (`>=0.19.8,<0.20`). What is
here has to be checked again before that range grows; `tests/training/test_engine.py` and
`tests/training/test_resharding.py` compare each of these with what it stands for. `tests/test_layers.py`
makes sure that no private name of DeepSpeed is anywhere else.

DeepSpeed is imported inside functions: it chooses its accelerator and patches torch when it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REDUCE_BUCKET = 500_000_000
"""Elements of the buffer in which stage 3 reduces gradients (`reduce_bucket_size`), DeepSpeed's default."""

MAX_LIVE_PARAMETERS = 1_000_000_000
"""Elements that stage 3 keeps gathered at a time (`stage3_max_live_parameters`), DeepSpeed's default."""

MODEL_FILE = "mp_rank_00_model_states.pt"
"""The file of a checkpoint with the model's weights; under stage 3 each worker has one, with a prefix."""

MODEL_FILE_OF_WORKER = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
"""Under stage 3: with nothing but the names and shapes of the weights."""

OPTIMIZER_FILE = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
"""What the name of the file with a worker's part of the optimizer's state ends with."""

WORKERS, SHAPES = "dp_world_size", "param_shapes"
"""Keys of a model's file: the number of workers, and `parameter_shapes`."""

OPTIMIZER = "optimizer_state_dict"
"""The key of an optimizer's file that holds its state; under stage 3 also the moments within that state."""

GROUP_WEIGHTS, GROUP_MOMENTS = "single_partition_of_fp32_groups", "base_optimizer_state"
"""Keys of the optimizer's state under stages 1 and 2: a group's weights in float32, and the moments."""

PARAMETER_WEIGHTS = "fp32_flat_groups"
"""The key of the weights in float32 under stage 3: the parts of a group's parameters in one flat tensor."""


class ClippingAdamW(torch.optim.AdamW):
    """AdamW for ZeRO stage 0 that clips the gradients itself and keeps their norm.

    At stage 0 DeepSpeed steps the bare optimizer and discards the norm that its own clipping computed.
    `DeepSpeedEngine.get_global_grad_norm` looks for the norm in the optimizer's `_global_grad_norm`.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, max_grad_norm: float) -> None:
        super().__init__(groups, learning_rate)
        self.max_grad_norm = max_grad_norm
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip, remember the norm before clipping, and update the parameters."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        return super().step(closure)


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of a parameter, which stage 3 replaces by an empty tensor with the shape in `ds_shape`."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def own_part(parameter: Any) -> torch.Tensor:
    """The values of a parameter; under stage 3 this worker's part of them.

    DeepSpeed cuts a parameter into parts of one length, and leaves uninitialised memory in the padding of
    the last ones.
    """
    if not hasattr(parameter, "ds_tensor"):
        values: torch.Tensor = parameter.detach()
        return values
    part: torch.Tensor = parameter.ds_tensor.detach()
    first = torch.distributed.get_rank() * part.numel()
    return part[: max(0, parameter.ds_numel - first)]


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The trained weights in the model's dtype, by name; every worker must call this.

    Stage 3 gathers them, on the first worker alone. The public `save_16bit_model` does not return them: it
    writes a file of a format of its own.
    """
    if engine.zero_optimization_stage() == 3:
        weights: dict[str, torch.Tensor] = engine._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=True
        )
        return weights
    return dict(engine.module.state_dict())


def parameter_shapes(engine: Any) -> Any:
    """Name -> shape of the parameters of each group of the optimizer under stage 3, in order."""
    return engine._get_zero_param_shapes()


def partition_sizes(optimizer: Any) -> list[int]:
    """Elements of this worker's partition of each group under stages 1 and 2, padding included.

    DeepSpeed has two optimizers, with and without bfloat16, that give it different names.
    """
    named = (GROUP_WEIGHTS, "fp32_groups_flat_partition")
    flat = next(getattr(optimizer, name) for name in named if hasattr(optimizer, name))
    return [partition.numel() for partition in flat]


def import_deepspeed() -> ModuleType:
    """DeepSpeed, without what it would import for parts that nobody asks here.

    mlflow, which its autotuner imports where it is installed, is three quarters of the time that the import
    takes. Every engine imports the Muon optimizer, which is compiled where it is defined: for that torch
    imports its compiler, which takes a worker two seconds. On a CPU every process group compiles an op in
    C++, which takes a minute on a new machine, and which inference with tensor parallelism alone calls.
    """
    unasked = "mlflow" not in sys.modules
    if unasked:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails at once
    try:
        import deepspeed
    finally:
        if unasked:
            del sys.modules["mlflow"]
    from deepspeed.runtime import compiler

    compiler.compile = lambda: compiler.dummy_decorator
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def async_io_builder() -> Any:
    """The builder of the op for NVMe, compiled against libaio; None if it cannot be built."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    return builder if builder.is_compatible() else None


def checkpoint_states(
    engine: Any, folder: Path, tag: str, copied: Callable[[str, Any], Any], further: Mapping[str, Any]
) -> dict[Path, Any]:
    """What DeepSpeed would save in the files of a checkpoint, as `copied(name of the file, state)`, by file.

    The states in `further` are saved beside the model's; `engine.load_checkpoint` returns them.

    Every worker must call this. The states are copied while the engine saves: it may not hold them together
    afterwards. States on NVMe, which DeepSpeed copies as files, are in `folder` then, and nothing else.

    DeepSpeed's own engines that write beside the training keep the states on the GPU or in shared memory for
    a second process, wait for it at the next step, and hash nothing.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    states: dict[Path, Any] = {}

    class Copying(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            states[Path(path)] = copied(Path(path).name, state_dict)

        def preserves_storage_sharing(self) -> bool:
            return False  # a copy holds what is seen of a tensor alone: DeepSpeed need not clone it before

    own, engine.checkpoint_engine = engine.checkpoint_engine, Copying(engine._config)
    # The first worker would write a script that merges the parts. If that fails, the others wait for it.
    engine._copy_recovery_script = lambda path: None
    try:
        # The parameters that LoRA freezes are in the base model already.
        engine.save_checkpoint(
            str(folder), tag, dict(further), save_latest=False, exclude_frozen_parameters=True
        )
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script
    return states
