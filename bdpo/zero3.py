"""DeepSpeed: train config -> ZeRO config, engine, export. The only module that knows DeepSpeed.

DeepSpeed is imported inside functions: it picks its accelerator and patches torch when imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from bdpo.adapters import add_lora
from bdpo.config import Config
from bdpo.logps import LogpsModel
from bdpo.models import load_model, model_folder
from bdpo.storage import cache_folder
from bdpo.tokens import ChatTokenizer


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of a train config.

    Batch sizes are 1 on purpose: micro-batches vary in size and number, so the boundary of an
    optimizer step is set by hand and the loss carries its own scale.
    """
    bf16 = config.model.dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def build_engine(config: Config, total_steps: int, warmup_steps: int) -> Any:
    """The policy, a LogpsModel, in a DeepSpeed engine with AdamW and its schedule.

    The process group is there already. Under stage 3 the model is partitioned while it is loaded: no
    worker ever holds all of it.
    """
    _choose_accelerator()
    import deepspeed
    import torch._dynamo  # a first import under zero.Init fails: it patches tensor creation
    from transformers import get_scheduler
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    ds_config = deepspeed_config(config)
    # from_pretrained partitions while this object is alive, and only then.
    alive = HfDeepSpeedConfig(ds_config) if config.train.zero_stage == 3 else None
    model = load_model(model_folder(config.model), config.model)
    del alive
    _disable_dropout(model)
    if config.train.lora:
        add_lora(model, config.train.lora, config.model, config.seed)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.train.weight_decay), config.train.learning_rate
    )
    scheduler = get_scheduler(config.train.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(
        model=LogpsModel(model, config.data.max_length),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=ds_config,
        dist_init_required=False,
    )
    engine.train()
    return engine


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


def _choose_accelerator() -> None:
    """On a machine without GPU: the CPU accelerator, its shared-memory op built once and complete.

    torch builds extensions under a lock file that a killed process leaves behind, and every later
    one waits for. Our own lock dies with its process, so whoever holds it may remove a stale one.
    """
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = cache_folder() / "torch_extensions"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    from deepspeed.comm.torch import build_shm_op

    with FileLock(folder / "build.lock"):
        for stale in folder.rglob("lock"):
            stale.unlink()
        build_shm_op()


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
