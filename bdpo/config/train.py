"""Section `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bdpo.config.base import Fraction, Positive, Section


class TrainConfig(Section):
    """Optimisation, its distribution over workers, and checkpoints."""

    workers: Positive = 1
    gpus_per_worker: float = Field(1.0, ge=0)
    accelerator_type: str | None = Field(
        None, description="train on nodes of this GPU alone: H100, A100, ..."
    )
    zero_stage: Literal[1, 2, 3] = 3
    global_batch_size: Positive = Field(64, description="pairs of one optimizer step, over all workers")
    tokens_per_micro_batch: Positive = Field(16384, description="padded tokens of one forward-backward")
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.1
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    num_train_epochs: Positive = 1
    max_steps: Positive | None = Field(None, description="end after so many steps instead")
    gradient_checkpointing: bool = True
    save_steps: Positive = 100
    save_total_limit: Positive = 2
    max_failures: int = Field(2, ge=-1, description="worker failures to recover from; -1: any number")
