"""DeepSpeed: train config -> ZeRO config, engine, export. The only module that knows DeepSpeed.

DeepSpeed is imported inside functions: it picks its accelerator and patches torch when imported.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from bdpo.config import Config, TrainConfig
from bdpo.errors import UserError
from bdpo.models.adapters import add_lora
from bdpo.models.attention import attention_of
from bdpo.models.loading import load_model, model_folder
from bdpo.models.logps import LogpsModel
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.cache import cache_folder
from bdpo.storage.digests import json_digest


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of a train config.

    Batch sizes are 1 on purpose: micro-batches vary in size and number, so the boundary of an
    optimizer step is set by hand and the loss carries its own scale.
    """
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm if train.zero_stage else 0.0,  # see _ClippingAdamW
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "offload_optimizer": _offload(train) if train.offload else None,
            "offload_param": _offload(train) if train.offload_parameters else None,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def build_engine(config: Config, total_steps: int, warmup_steps: int) -> Any:
    """The policy, a LogpsModel, in a DeepSpeed engine with AdamW and its schedule.

    The process group is there already. Under stage 3 the model is partitioned while it is loaded: no
    worker ever holds all of it.

    Raises:
        UserError: `train.offload=nvme` where DeepSpeed cannot do it.
    """
    _choose_accelerator(config.train)
    import deepspeed
    import torch._dynamo  # a first import under zero.Init fails: it patches tensor creation
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    ds_config = deepspeed_config(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = attention_of(config, device)  # before what follows would partition its trials
    # from_pretrained partitions while this object is alive, and only then.
    alive = HfDeepSpeedConfig(ds_config) if config.train.zero_stage == 3 else None
    model = load_model(model_folder(config.model), config.model, attention)
    del alive
    _disable_dropout(model)
    if config.train.lora:
        add_lora(model, config.train.lora, config.model, config.seed)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = _parameter_groups(model, config.train.weight_decay)
    if config.train.zero_stage:
        # Fused: DeepSpeed steps offloaded states on the CPU with this very optimizer.
        optimizer = torch.optim.AdamW(groups, config.train.learning_rate, fused=bool(config.train.offload))
    else:
        optimizer = _ClippingAdamW(groups, config.train.learning_rate, config.train.max_grad_norm)
    scheduler = learning_rates(config.train.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(
        model=LogpsModel(model, config.data.max_length),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=ds_config,
        dist_init_required=False,
    )
    engine.train()
    return engine


def learning_rates(
    kind: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`train.lr_scheduler_type` after a linear warmup."""
    from transformers import get_scheduler

    # What transformers calls constant has no warmup.
    kind = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(kind, optimizer, warmup_steps, total_steps)


def export(engine: Any, chat: ChatTokenizer, folder: Path) -> None:
    """Gather the trained weights, write them as from_pretrained loads them; every worker must call this.

    All that is written of a model with LoRA is its adapter, as PEFT loads it.
    """
    if engine.zero_optimization_stage() == 3:  # in the model's dtype; rank 0 only
        weights = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    else:
        weights = engine.module.state_dict()
    if torch.distributed.get_rank() == 0:
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        engine.module.model.save_pretrained(folder, state_dict=weights)
        chat.tokenizer.save_pretrained(folder)
    torch.distributed.barrier()


class _ClippingAdamW(torch.optim.AdamW):
    """Clips gradients itself and keeps their norm where DeepSpeed looks for it.

    At stage 0 DeepSpeed steps the bare optimizer and forgets the norm that its own clipping found.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, max_grad_norm: float) -> None:
        super().__init__(groups, learning_rate)
        self.max_grad_norm = max_grad_norm
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        return super().step(closure)


def _offload(train: TrainConfig) -> dict[str, Any]:
    pinned = torch.cuda.is_available()
    return {"device": train.offload, "nvme_path": train.nvme_path, "pin_memory": pinned}


def _async_io() -> Any:
    """What builds the op by which NVMe is read and written, which DeepSpeed compiles against libaio."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible():
        raise UserError(
            "train.offload=nvme: DeepSpeed's async_io op cannot be built on this node; "
            "install libaio-dev, or use train.offload=cpu"
        )
    return builder


def _choose_accelerator(train: TrainConfig) -> None:
    """On a machine without GPU: the CPU accelerator, its ops built once and complete.

    torch builds extensions under a lock file that a killed process leaves behind, and every later
    one waits for. Our own lock dies with its process, so whoever holds it may remove a stale one.
    """
    if torch.cuda.is_available():
        if train.offload == "nvme":
            _async_io()
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    # An op is built against one torch by one ninja, whose log another version takes for outdated: of two
    # environments each would build the op anew for the other, which takes minutes.
    built_by = [sys.prefix, torch.__version__, shutil.which("ninja")]
    folder = cache_folder() / "torch_extensions" / json_digest(built_by)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    from deepspeed.comm.torch import build_shm_op

    with FileLock(folder / "build.lock"):
        for stale in folder.rglob("lock"):
            stale.unlink()
        build_shm_op()
        if train.offload == "nvme":
            _async_io().load()


def _disable_dropout(model: torch.nn.Module) -> None:
    """As TRL does: with dropout the policy differs from the reference before the first step."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on norms and biases; a partitioned parameter's shape is ds_shape.

    Adapters have no norms and biases: an empty group is none.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
