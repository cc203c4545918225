"""Section `train`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bdpo.config.base import Distinct, StallSeconds, Workers, worker_range
from bdpo.section import RUNTIME_ONLY, Fraction, Positive, Section


class LoraConfig(Section):
    """LoRA: the model is frozen, low-rank adapters of its linear layers are trained (PEFT's vocabulary)."""

    r: Positive = Field(16, description="rank")
    alpha: Positive = Field(32, description="the adapter counts alpha / r times")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the inputs of the adapters")
    target_modules: str | list[str] = Field(
        "all-linear", description="names of layers, a regular expression, or all linear layers but the head"
    )


class TrainConfig(Section):
    """Optimisation, its distribution over workers, and checkpoints."""

    workers: Annotated[Workers, RUNTIME_ONLY] = Field(
        1, description="processes: ZeRO ranks; `[min, max]` follows the cluster"
    )
    gpus_per_worker: Annotated[float, RUNTIME_ONLY] = Field(
        1.0, ge=0, description="GPUs of one process; 0 trains on the CPU"
    )
    accelerator_type: Annotated[str | None, RUNTIME_ONLY] = Field(
        None, description="train on nodes of this GPU alone: H100, A100, ..."
    )
    gpu_memory: Annotated[float | None, RUNTIME_ONLY] = Field(
        None, gt=0, description="GiB of one GPU, by default this machine's"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        3, description="partitioned are: 1 optimizer, 2 gradients too, 3 parameters too"
    )
    offload: Literal["cpu", "nvme"] | None = Field(None, description="where the optimizer's state is kept")
    offload_parameters: bool = Field(False, description="the parameters as well; requires zero_stage=3")
    nvme_path: str | None = Field(None, description="folder on each node's NVMe disk, for offload=nvme")
    global_batch_size: Positive = Field(
        64, description="pairs of one optimizer step; need not be a multiple of the workers"
    )
    tokens_per_micro_batch: Annotated[Positive, RUNTIME_ONLY] = Field(
        16384, description="padded tokens of one forward-backward"
    )
    learning_rate: float = Field(1e-6, gt=0, description="of AdamW, after the warmup")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warmup"
    )
    warmup_ratio: Fraction = Field(0.1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    num_train_epochs: Positive = Field(1, description="how often each pair is trained on")
    max_steps: Positive | None = Field(None, description="end after so many steps instead")
    gradient_checkpointing: Annotated[bool, RUNTIME_ONLY] = Field(
        True, description="compute activations again in the backward pass, to save memory"
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], Distinct, RUNTIME_ONLY] = Field(
        ["tensorboard"], description="besides metrics.jsonl; wandb and mlflow require the extra `tracking`"
    )
    save_minutes: Annotated[float | None, RUNTIME_ONLY] = Field(
        15.0, gt=0, description="a checkpoint is due after so many minutes; not with metric_for_best_model"
    )
    save_steps: Annotated[Positive | None, RUNTIME_ONLY] = Field(
        None, description="and after so many steps; the last step has a checkpoint in any case"
    )
    save_total_limit: Annotated[Positive, RUNTIME_ONLY] = Field(
        2, description="checkpoints to keep, and the latest if it is not one"
    )
    lora: LoraConfig | None = Field(None, description="train adapters; they need a higher learning_rate")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="of the pairs, held out and never trained on")
    eval_steps: Annotated[Positive, RUNTIME_ONLY] = Field(
        100, description="evaluate on them so often, and at the end"
    )
    metric_for_best_model: str | None = Field(
        None, description="keep the checkpoints that are best by this metric of the held-out pairs"
    )
    greater_is_better: bool | None = Field(None, description="by default, unless the metric is a loss")
    load_best_model_at_end: bool = Field(False, description="export the best checkpoint, not the last")
    max_failures: Annotated[int, RUNTIME_ONLY] = Field(
        2, ge=-1, description="worker failures to recover from; -1: any number"
    )
    stall_seconds: StallSeconds = 60.0

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> TrainConfig:
        if self.offload and self.zero_stage == 0:
            raise ValueError(f"offload={self.offload} requires zero_stage=1, 2 or 3")
        if self.offload_parameters and (self.zero_stage < 3 or not self.offload):
            raise ValueError("offload_parameters requires zero_stage=3 and offload=cpu or nvme")
        if self.offload == "nvme" and (self.zero_stage < 3 or not self.nvme_path):
            raise ValueError("offload=nvme requires zero_stage=3 and nvme_path")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> TrainConfig:
        if self.load_best_model_at_end and not self.metric_for_best_model:
            raise ValueError("load_best_model_at_end requires metric_for_best_model")
        if self.metric_for_best_model and not self.eval_fraction:
            raise ValueError("metric_for_best_model requires held-out pairs: eval_fraction above 0")
        if self.metric_for_best_model and (not self.save_steps or self.save_steps % self.eval_steps):
            raise ValueError("metric_for_best_model requires save_steps to be a multiple of eval_steps")
        return self

    @property
    def minutes_between_saves(self) -> float | None:
        """None if checkpoints are saved by steps alone: which one is best must not depend on the clock."""
        return None if self.metric_for_best_model else self.save_minutes

    @property
    def min_workers(self) -> int:
        """The least number of workers that train."""
        return worker_range(self.workers)[0]

    @property
    def max_workers(self) -> int:
        """The greatest number of workers that train."""
        return worker_range(self.workers)[1]

    @property
    def best_metric(self) -> str | None:
        """`metric_for_best_model` with its prefix, which may be left out."""
        name = self.metric_for_best_model
        return name and f"eval_{name.removeprefix('eval_')}"

    @property
    def best_is_greatest(self) -> bool:
        """Whether a greater value of `best_metric` is a better one."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not (self.metric_for_best_model or "").endswith("loss")
