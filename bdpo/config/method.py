"""Section `method`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bdpo.config.base import Section

MethodName = Literal["bdpo", "dpo", "dpo_bw", "dpo_sf", "ipo", "cdpo", "robust", "cpo", "simpo", "safedpo"]


def default_beta(method: str) -> float:
    """SimPO's rewards are per token: with 0.1 it would hardly learn (arXiv 2405.14734)."""
    return 2.0 if method == "simpo" else 0.1


class MethodConfig(Section):
    """The loss, its balance weights (B-DPO, arXiv 2603.22829), and what the baselines alone look at."""

    name: MethodName = Field("bdpo", description="a key of bdpo.method.losses.LOSSES")
    alpha: float = Field(1.5, gt=0, description="total of the two weights")
    beta: float = Field(0.1, gt=0, description="strength of the reference; 2.0 by default for simpo")
    balance: Literal["ratio", "softmax", "none"] = "ratio"
    sharpness: float = 1.0
    mi_floor: float = Field(0.01, gt=0, description="nats per token below which MI counts as this")
    min_share: float = Field(0.05, ge=0, le=0.5, description="no response gets less of alpha than this")
    label_smoothing: float = Field(
        0.1, ge=0, lt=0.5, description="cdpo, robust: how likely a label is wrong; with 0 both are dpo"
    )
    cpo_alpha: float = Field(1.0, ge=0, description="cpo: weight of the chosen response's likelihood")
    simpo_gamma: float = Field(0.5, ge=0, description="simpo: the margin that rewards are to reach")
    safedpo_delta: float = Field(
        10.0, ge=0, description="safedpo: the margin added where just one response is unsafe"
    )

    @model_validator(mode="before")
    @classmethod
    def _beta_of_the_method(cls, values: Any) -> Any:
        """The default of beta is the method's; an explicit one stands."""
        if isinstance(values, dict) and isinstance(values.get("name"), str):
            return {"beta": default_beta(values["name"]), **values}
        return values
