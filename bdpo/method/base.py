"""What every method is made of: the pairs that a loss looks at, what it outputs, and the base of its class.

w is the chosen response, l the rejected one; lp = log π(y|c(x)) and Δ = lp - log π_ref(y|c(x)), summed over
response tokens, of which there are |y|; h = Δ_w - Δ_l. Every tensor has shape (pairs,).

This module and `bdpo.method.losses` are part of the config, so they import torch only where a loss computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from bdpo.section import Variant

if TYPE_CHECKING:
    import torch

Side = Literal["chosen", "rejected"]

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""What is logged of every loss that compares two responses, by TRL's names."""

BALANCE_METRICS = ("balance/weight_chosen", "balance/weight_rejected", "balance/margins")
"""What is logged of a loss that weighs them."""


@dataclass(frozen=True)
class PairLogps:
    """What a loss may look at, each of shape (pairs,): log-probs in nats, counts, weights, labels.

    What the method does not use may be NaN: log-probs and weights that were never computed.
    """

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    weight_chosen: torch.Tensor
    weight_rejected: torch.Tensor
    chosen_unsafe: torch.Tensor
    rejected_unsafe: torch.Tensor

    @property
    def deltas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Δ_w, Δ_l)."""
        return self.policy_chosen - self.reference_chosen, self.policy_rejected - self.reference_rejected

    @property
    def mean_logps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(lp_w/|y_w|, lp_l/|y_l|), nats per token."""
        return self.policy_chosen / self.chosen_tokens, self.policy_rejected / self.rejected_tokens

    def swapped(self, which: torch.Tensor) -> PairLogps:
        """Chosen and rejected exchanged where `which`, a bool of shape (pairs,), is true."""
        columns: dict[str, torch.Tensor] = {}
        for chosen in (field.name for field in fields(self) if "chosen" in field.name):
            rejected = chosen.replace("chosen", "rejected")
            one, other = getattr(self, chosen), getattr(self, rejected)
            columns |= {chosen: other.where(which, one), rejected: one.where(which, other)}
        return PairLogps(**columns)


@dataclass(frozen=True)
class LossOutput:
    """The loss of each pair and what is logged of it, every tensor of shape (pairs,).

    Rewards are β·Δ whatever the weights, so that curves of all methods compare; without a reference they
    are what TRL's are, β·lp (CPO) and β·lp/|y| (SimPO). A method that compares no responses has none.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Method(Variant, ABC):
    """A preference loss: its keys, what it requires of the pairs, and the loss itself.

    The docs are made of the class: its docstring is what the method does in words, that of `loss` the
    equation and its source, and every key has its description.
    """

    arxiv: ClassVar[str | None] = None
    """The identifier of the paper."""

    requires_reference: ClassVar[bool] = True
    """Whether the loss looks at the reference model's log-probs, so that pairs are scored first."""

    requires_safety_labels: ClassVar[bool] = False
    """Whether every pair needs `chosen_safe` and `rejected_safe`."""

    responses: ClassVar[tuple[Side, ...]] = ("chosen", "rejected")
    """The responses of a pair that the loss looks at; the policy forwards no other."""

    own_metrics: ClassVar[tuple[str, ...]] = ()
    """What the loss logs beside what its base class does."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names in `LossOutput.metrics`, known before anything is computed."""
        return self.own_metrics

    @property
    def product_keys(self) -> tuple[str, ...]:
        """Keys that stand in the loss as their product alone: a search over them searches one number."""
        return ()

    def loss_settings(self) -> Mapping[str, object]:
        """What the gradient depends on, by name: settings with equal values train the same model."""
        values = self.model_dump()
        if self.product_keys:
            values["·".join(self.product_keys)] = math.prod(values.pop(key) for key in self.product_keys)
        return values

    @abstractmethod
    def loss(self, pairs: PairLogps) -> LossOutput:
        """The loss of each pair; all shapes (pairs,)."""

    def weights(
        self, mi_chosen: torch.Tensor, mi_rejected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`PairLogps.weight_chosen` and `weight_rejected`; NaN for a method without weights.

        Both are made of the mutual information in nats per token; all shapes (pairs,).
        """
        unknown = mi_chosen.new_full(mi_chosen.shape, float("nan"))
        return unknown, unknown


class Preference(Method):
    """A method that compares the two responses of a pair."""

    beta: float = Field(0.1, gt=0, description="strength of the reference")

    @property
    def metrics(self) -> tuple[str, ...]:
        """`PAIR_METRICS` and the method's own."""
        return (*PAIR_METRICS, *self.own_metrics)

    def rewards(self, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """(β·Δ_w, β·Δ_l)."""
        delta_chosen, delta_rejected = pairs.deltas
        return self.beta * delta_chosen, self.beta * delta_rejected


class Anchored(Preference):
    """A method whose loss may be joined by the likelihood of the chosen response, which anchors it.

    The term is that of "Iterative Reasoning Preference Optimization" (arXiv 2404.19733), weighted as TRL's
    `rpo_alpha` did; it is per token of each pair, where TRL takes all tokens of a batch together.
    """

    nll_weight: float = Field(0.0, ge=0, description="weight λ of −lp_w/|y_w|, which is added to the loss")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of every comparison, and the likelihood if it is part of the loss."""
        return (*super().metrics, *(("nll_loss",) if self.nll_weight else ()))

    def output(
        self,
        loss: torch.Tensor,
        pairs: PairLogps,
        rewards: tuple[torch.Tensor, torch.Tensor],
        **more: torch.Tensor,
    ) -> LossOutput:
        """`loss_output` of the loss with its anchor; all shapes (pairs,)."""
        if self.nll_weight:
            more["nll_loss"] = -pairs.mean_logps[0]
            loss = loss + self.nll_weight * more["nll_loss"]
        return loss_output(loss, pairs, rewards, **more)


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """log σ(x), stable for every x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def loss_output(
    loss: torch.Tensor,
    pairs: PairLogps,
    rewards: tuple[torch.Tensor, torch.Tensor],
    **more: torch.Tensor,
) -> LossOutput:
    """The loss with `PAIR_METRICS`, and `more` metrics of the method's own."""
    chosen, rejected = rewards
    compared = chosen, rejected, chosen - rejected, (chosen > rejected).float()
    values = *compared, pairs.policy_chosen, pairs.policy_rejected
    metrics = dict(zip(PAIR_METRICS, values, strict=True)) | more
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})
