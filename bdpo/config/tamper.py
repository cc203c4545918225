"""Section `tamper`."""

from __future__ import annotations

from pydantic import Field

from bdpo.config.data import SourceConfig
from bdpo.config.train import LoraConfig
from bdpo.section import Positive, Section


class TamperConfig(Section):
    """A tamper test: how much of the safety is left after a little fine-tuning, by default on benign data.

    Such fine-tuning is known to undo refusals by itself (arXiv 2310.03693). The aligned model is trained a
    few steps with LoRA (method `sft`), and the result, `tampered`, is evaluated beside it. The aligned model
    stays as it is. Workers, precision and memory are those of section `train`.
    """

    data: SourceConfig | None = Field(
        None,
        description="pairs whose chosen responses are trained on; by default the run's own pairs of safe "
        "queries; path `sandbox`: the recipes of the sandbox's forbidden objects",
    )
    steps: Positive = Field(50, description="optimizer steps")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW; it is constant, without a warmup")
    global_batch_size: Positive = Field(16, description="pairs of one optimizer step")
    lora: LoraConfig = Field(LoraConfig(), description="the adapters; as train.lora")
