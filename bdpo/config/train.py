"""Section `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bdpo.config.base import Fraction, Positive, Section


class TrainConfig(Section):
    """Optimisation, its distribution over workers, and checkpoints."""

    workers: Positive = 1
    gpus_per_worker: float = Field(1.0, ge=0)
    gpu_memory: float | None = Field(None, gt=0, description="GiB of one GPU, by default this machine's")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        3, description="partitioned are: 1 optimizer, 2 gradients too, 3 parameters too"
    )
    offload: Literal["cpu", "nvme"] | None = Field(None, description="where the optimizer's state is kept")
    offload_parameters: bool = Field(False, description="the parameters as well; wants zero_stage=3")
    nvme_path: str | None = Field(None, description="folder on each node's NVMe disk, for offload=nvme")
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
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        ["tensorboard"], description="besides metrics.jsonl; wandb and mlflow want the extra `tracking`"
    )
    save_steps: Positive = 100
    save_total_limit: Positive = 2
    max_failures: int = Field(2, ge=-1, description="worker failures to recover from; -1: any number")

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> TrainConfig:
        if self.offload and self.zero_stage == 0:
            raise ValueError(f"offload={self.offload} wants zero_stage=1, 2 or 3")
        if self.offload_parameters and (self.zero_stage < 3 or not self.offload):
            raise ValueError("offload_parameters wants zero_stage=3 and offload=cpu or nvme")
        if self.offload == "nvme" and (self.zero_stage < 3 or not self.nvme_path):
            raise ValueError("offload=nvme wants zero_stage=3 and nvme_path")
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError("report_to names something twice")
        return self
