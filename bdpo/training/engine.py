"""The DeepSpeed engine of a training: ZeRO config, building the engine, exporting the trained weights.

DeepSpeed is imported inside functions: it chooses its accelerator and patches torch when it is imported. What
depends on more than its documented interface is in `bdpo.models.deepspeed_internals`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bdpo.config import Config, TrainConfig
from bdpo.errors import UserError
from bdpo.models.adapters import add_lora
from bdpo.models.architectures import switch_off_dropout, trains_as_it_scores
from bdpo.models.attention import attention_of
from bdpo.models.deepspeed_internals import (
    ClippingAdamW,
    async_io_builder,
    full_shape,
    import_deepspeed,
    trained_weights,
)
from bdpo.models.loading import load_model, model_config, model_folder, require_complete_weights
from bdpo.models.logps import LogpsModel
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.cache import cache_folder, machine_lock
from bdpo.storage.digests import json_digest


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON of a train config.

    Both batch sizes are 1 on purpose. Micro-batches are filled up to a number of tokens, so they vary in size
    and number, and DeepSpeed cannot count them: the training loop sets the boundary of an optimizer step and
    scales each loss itself.
    """
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm if train.zero_stage else 0.0,  # see ClippingAdamW
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
    """The policy, a LogpsModel, in a DeepSpeed engine with AdamW and its learning rate schedule.

    The process group must be initialised. Under stage 3 the model is partitioned while it is loaded, so that
    no worker ever holds all of it.

    Raises:
        UserError: `train.offload=nvme` on a node where DeepSpeed's op cannot be built; the weights are not
            complete; the architecture computes something else in training.
    """
    _choose_accelerator(config.train)
    deepspeed = import_deepspeed()
    import torch._dynamo  # imported first under zero.Init, which patches tensor creation, it fails

    if config.train.offload:
        torch.set_num_threads(cores_of_a_worker())
    ds_config = deepspeed_config(config)
    model = _load_policy(config, ds_config)
    groups = _parameter_groups(model, config.train.weight_decay)
    if config.train.zero_stage:
        # Offloaded optimizer states are stepped on the CPU by this same optimizer, where fused is faster.
        optimizer = torch.optim.AdamW(groups, config.train.learning_rate, fused=bool(config.train.offload))
    else:
        optimizer = ClippingAdamW(groups, config.train.learning_rate, config.train.max_grad_norm)
    scheduler = learning_rates(config.train.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(
        model=LogpsModel(model, config.data.max_length, one_forward=True),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=ds_config,
        dist_init_required=False,
    )
    engine.train()
    return engine


def cores_of_a_worker() -> int:
    """Threads for the optimizer of offloaded states, which steps on the CPU; Ray gives a worker one."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _load_policy(config: Config, ds_config: dict[str, Any]) -> Any:
    """The model that is trained: partitioned under stage 3, without dropout, with the adapters of LoRA."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = attention_of(config, device)  # tries small models, which zero.Init would partition
    folder, hf_config = model_folder(config.model), model_config(config.model)
    if not trains_as_it_scores(hf_config):
        raise UserError(
            f"model.name_or_path={config.model.name_or_path}: {hf_config.model_type} models compute "
            "something else in training than in evaluation (random routing); it can be scored and "
            "evaluated alone"
        )
    if config.train.zero_stage == 3:
        require_on_first_worker(lambda: require_complete_weights(config.model))
    # from_pretrained partitions while an HfDeepSpeedConfig is alive: transformers holds a weak reference.
    alive = HfDeepSpeedConfig(ds_config) if config.train.zero_stage == 3 else None
    model = load_model(folder, config.model, attention)
    del alive
    switch_off_dropout(model)
    if config.train.lora:
        add_lora(model, config.train.lora, config.model, config.seed)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def learning_rates(
    kind: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule `train.lr_scheduler_type` after a linear warmup."""
    from transformers import get_scheduler

    # The schedule that transformers calls "constant" has no warmup.
    kind = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(kind, optimizer, warmup_steps, total_steps)


def export(engine: Any, chat: ChatTokenizer, folder: Path) -> None:
    """Gather the trained weights and write them as from_pretrained loads them; every worker must call this.

    Of a model with LoRA only the adapter is written, as PEFT loads it.
    """
    weights = trained_weights(engine)
    if torch.distributed.get_rank() == 0:
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
        engine.module.model.save_pretrained(folder, state_dict=weights)
        chat.tokenizer.save_pretrained(folder)
    torch.distributed.barrier()


def trained_parameters(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name -> values of what is trained, each gathered alone; every worker must go through all of them.

    It is DeepSpeed's public way to the weights, and another one than that of `export`.
    """
    gathered = import_deepspeed().zero.GatheredParameters
    for name, parameter in engine.module.model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                yield name, parameter.detach()


def require_on_first_worker(check: Callable[[], None]) -> None:
    """Run a check on the first worker alone; where it fails, all of them fail, so that none waits for it.

    Raises:
        UserError: the check failed.
    """
    failure: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            check()
        except UserError as error:
            failure = [str(error)]
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])


def _offload(train: TrainConfig) -> dict[str, str | bool | None]:
    pinned = torch.cuda.is_available()
    return {"device": train.offload, "nvme_path": train.nvme_path, "pin_memory": pinned}


def _async_io() -> Any:
    """The builder of DeepSpeed's op for NVMe.

    Raises:
        UserError: the op cannot be built on this node.
    """
    builder = async_io_builder()
    if builder is None:
        raise UserError(
            "train.offload=nvme: DeepSpeed's async_io op cannot be built on this node; "
            "install libaio-dev, or use train.offload=cpu"
        )
    return builder


def _choose_accelerator(train: TrainConfig) -> None:
    """Choose DeepSpeed's CPU accelerator on a machine without a GPU, and compile what NVMe requires once.

    torch compiles extensions under a lock file. A killed process leaves that file behind, and every later
    process waits for it for ever. The kernel releases our own lock when its process dies, so whoever holds it
    knows that no other process compiles, and may remove torch's stale lock files.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    if train.offload != "nvme":
        return
    # An op is built against one torch by one ninja, whose log another version takes for outdated: of two
    # environments each would build the op anew for the other, which takes minutes.
    built_by = [sys.prefix, torch.__version__, shutil.which("ninja")]
    folder = cache_folder() / "torch_extensions" / json_digest(built_by)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with machine_lock(folder / "build.lock"):
        for stale in folder.rglob("lock"):
            stale.unlink()
        _async_io().load()


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight decay on matrices only, not on norms and biases.

    Groups without parameters are left out: adapters have no norms and biases.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) >= 2]
    vectors = [p for p in trainable if len(full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
