"""Mutual information between query and response, and the balance weights made of it.

Source: B-DPO, arXiv 2603.22829. The response that the reference already understands better is
optimised less. The exact form of the shares is our reading of the paper, hence the named rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from bdpo.method.base import BALANCE_METRICS, Anchored, Method
from bdpo.section import Positive, Section

if TYPE_CHECKING:
    import torch

MI_FLOOR = 0.01
"""Nats per token: what `mi_floor` is by default, and in reports on methods without balance weights."""


def mutual_information(
    cond_logps: torch.Tensor, uncond_logps: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """I(x;y) = [log π_ref(y|c(x)) - log π_ref(y|c(∅))] / |y|, nats per token; all shapes (pairs,)."""
    return (cond_logps - uncond_logps) / num_tokens


class Reestimate(Section):
    """Mutual information that is computed again from the policy while it is trained, for the weights alone.

    The paper names it as future work. The log-probs of the reference in the loss stay what they were scored
    as, and so do the weights of held-out pairs, whose losses would not compare otherwise.
    """

    every: Literal["epoch"] | Positive = Field(
        "epoch", description="before each epoch but the first, or after so many steps"
    )
    source: Literal["policy", "mix"] = Field(
        "policy", description="the estimate: that of the policy, or its mean with that of the reference"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the old values that the new ones keep")


class Balanced(Anchored):
    """A method that weighs the two responses of a pair by their mutual information."""

    own_metrics = BALANCE_METRICS

    balance: Literal["ratio", "softmax", "none"] = Field(
        "ratio", description="rule by which mutual information becomes shares"
    )
    sharpness: float = Field(1.0, description="exponent of the shares; 0 makes them equal")
    mi_floor: float = Field(MI_FLOOR, gt=0, description="nats per token below which MI counts as this")
    min_share: float = Field(0.05, ge=0, le=0.5, description="neither response gets a smaller share")
    balance_on: Literal["margin", "gradient"] = Field(
        "margin", description="where the weights act: inside the sigmoid, or on the gradients alone"
    )
    reestimate: Reestimate | None = Field(
        None, description="compute the mutual information again in the course of the training"
    )

    @model_validator(mode="after")
    def _reestimation_matters(self) -> Self:
        if self.reestimate and (self.balance == "none" or not self.sharpness or self.min_share == 0.5):
            raise ValueError("reestimate: the weights are equal whatever the mutual information is")
        return self

    def shares(self, mi_chosen: torch.Tensor, mi_rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(ω_w, ω_l) of each pair, ω_w + ω_l = 1; inputs in nats per token, all shapes (pairs,).

        With γ = `sharpness` and s = max(I, mi_floor), the share of the chosen response is
        `ratio`: s_l^γ / (s_w^γ + s_l^γ) = σ(γ·(ln s_l - ln s_w)); `softmax`: σ(γ·(I_l - I_w)); `none`: ½.
        Both shares are kept within [min_share, 1 - min_share].
        """
        if self.balance == "none":
            share_chosen = mi_chosen.new_full(mi_chosen.shape, 0.5)
        elif self.balance == "softmax":
            share_chosen = (self.sharpness * (mi_rejected - mi_chosen)).sigmoid()
        else:
            log_chosen, log_rejected = (mi.clamp(min=self.mi_floor).log() for mi in (mi_chosen, mi_rejected))
            share_chosen = (self.sharpness * (log_rejected - log_chosen)).sigmoid()
        share_chosen = share_chosen.clamp(self.min_share, 1 - self.min_share)
        return share_chosen, 1 - share_chosen

    def weights(
        self, mi_chosen: torch.Tensor, mi_rejected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares, `strength` times; inputs in nats per token, all shapes (pairs,)."""
        share_chosen, share_rejected = self.shares(mi_chosen, mi_rejected)
        return self.strength * share_chosen, self.strength * share_rejected

    @property
    def strength(self) -> float:
        """The total of the two weights."""
        return 1.0


def reestimate_of(method: Method) -> Reestimate | None:
    """How the method's mutual information is computed again during a training; None if it is not."""
    return method.reestimate if isinstance(method, Balanced) else None


def mi_floor_of(method: Method) -> float:
    """Nats per token below which the mutual information of a response counts as floored."""
    return method.mi_floor if isinstance(method, Balanced) else MI_FLOOR
