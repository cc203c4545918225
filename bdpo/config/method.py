"""Section `method`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from bdpo.config.base import Section


class MethodConfig(Section):
    """The loss and its balance weights (design of B-DPO, arXiv 2603.22829)."""

    name: str = "bdpo"
    alpha: float = Field(1.5, gt=0, description="total of the two weights")
    beta: float = Field(0.1, gt=0)
    balance: Literal["ratio", "softmax", "none"] = "ratio"
    sharpness: float = 1.0
    mi_floor: float = Field(0.01, gt=0, description="nats per token below which MI counts as this")
    min_share: float = Field(0.05, ge=0, le=0.5, description="no response gets less of alpha than this")

    @field_validator("name")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        from bdpo.losses import LOSSES  # losses import this module for the type

        if name not in LOSSES:
            raise ValueError(f"wants one of {', '.join(LOSSES)}")
        return name
