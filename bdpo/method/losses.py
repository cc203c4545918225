"""Every preference loss: a class with the keys that the loss looks at, and the loss itself.

A new loss is a class here, or in `bdpo.method.reference_free`, and its name in `AnyMethod`. The symbols are
those of `bdpo.method.base`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field

from bdpo.method.base import BALANCE_METRICS, Anchored, LossOutput, Method, PairLogps, log_sigmoid
from bdpo.method.mi import Balanced
from bdpo.method.reference_free import Cpo, Orpo, Sft, Simpo
from bdpo.section import default_kind, sections_in

if TYPE_CHECKING:
    import torch


class Bdpo(Balanced):
    """Balanced DPO: DPO whose two sides are weighed by mutual information; the weights sum to α."""

    arxiv = "2603.22829"
    name: Literal["bdpo"] = "bdpo"
    alpha: float = Field(1.5, gt=0, description="scaling factor: the total of the two weights")

    @property
    def product_keys(self) -> tuple[str, ...]:
        """α and β; none where the weights act on the gradients, since α is then no part of the margin."""
        return ("alpha", "beta") if self.balance_on == "margin" else ()

    @property
    def strength(self) -> float:
        """The total of the two weights, α."""
        return self.alpha

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(a_w·Δ_w − a_l·Δ_l)) with a_w = α·ω_w and a_l = α·ω_l.

        With `balance_on` = `gradient` the value is that of plain DPO, −log σ(β·h) with h = Δ_w − Δ_l, and its
        gradient is −β·σ(−β·h)·(a_w·∇lp_w − a_l·∇lp_l). The paper can be read either way, and we do
        not know which one it means.
        """
        weights = pairs.weight_chosen, pairs.weight_rejected
        return _weighted_dpo(self, pairs, weights, on=self.balance_on)


class DpoBw(Balanced):
    """The ablation "DPO + balance weights": B-DPO without the scaling factor, weights of 1 in all."""

    arxiv = "2603.22829"
    name: Literal["dpo_bw"] = "dpo_bw"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(ω_w·Δ_w − ω_l·Δ_l)) with ω_w + ω_l = 1; `balance_on` is as for `bdpo`."""
        weights = pairs.weight_chosen, pairs.weight_rejected
        return _weighted_dpo(self, pairs, weights, on=self.balance_on)


class DpoSf(Anchored):
    """The ablation "DPO + scaling factor": equal weights, made of α, whatever the mutual information.

    We do not know whether the paper's scaling factor alone gives each response α/2, as `bdpo` does where
    both are understood alike, or α: `side_weight` has both readings.
    """

    arxiv = "2603.22829"
    own_metrics = BALANCE_METRICS
    name: Literal["dpo_sf"] = "dpo_sf"
    alpha: float = Field(1.5, gt=0, description="scaling factor, of which `side_weight` makes the weights")
    side_weight: Literal["alpha/2", "alpha"] = Field("alpha/2", description="weight a of each response")

    @property
    def product_keys(self) -> tuple[str, ...]:
        """α and β."""
        return ("alpha", "beta")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·a·(Δ_w − Δ_l)), a = α/2 or α."""
        weight = self.alpha if self.side_weight == "alpha" else self.alpha / 2
        weights = pairs.policy_chosen.new_full(pairs.policy_chosen.shape, weight)
        return _weighted_dpo(self, pairs, (weights, weights))


class Dpo(Anchored):
    """Plain DPO."""

    arxiv = "2305.18290"
    own_metrics = BALANCE_METRICS
    name: Literal["dpo"] = "dpo"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(Δ_w − Δ_l)), equation 7."""
        one = pairs.policy_chosen.new_ones(pairs.policy_chosen.shape)
        return _weighted_dpo(self, pairs, (one, one))


class Dpop(Anchored):
    """DPO-Positive: a penalty where the chosen response is less likely than under the reference."""

    arxiv = "2402.13228"
    name: Literal["dpop"] = "dpop"
    dpop_lambda: float = Field(
        50.0, ge=0, description="weight λ of the penalty; with 0 the loss is that of dpo"
    )

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(Δ_w − Δ_l − `dpop_lambda`·max(0, −Δ_w)))."""
        rewards = self.rewards(pairs)
        penalty = self.dpop_lambda * (-rewards[0]).clamp(min=0)
        return self.output(-log_sigmoid(rewards[0] - rewards[1] - penalty), pairs, rewards)


class Ipo(Anchored):
    """Squared distance of the margin from 1/(2β), per token as in TRL."""

    arxiv = "2310.12036"
    name: Literal["ipo"] = "ipo"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """(Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))², equation 17."""
        delta_chosen, delta_rejected = pairs.deltas
        margins = delta_chosen / pairs.chosen_tokens - delta_rejected / pairs.rejected_tokens
        return self.output((margins - 1 / (2 * self.beta)) ** 2, pairs, self.rewards(pairs))


class LabelNoise(Anchored):
    """A method that takes the label of a pair for wrong with probability `label_smoothing`."""

    label_smoothing: float = Field(
        0.1, ge=0, lt=0.5, description="probability ε that a label is wrong; with 0 the loss is that of dpo"
    )

    def both_ways(self, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """-log σ(βh) and -log σ(-βh): the loss of DPO if the label is right, and if it is wrong."""
        reward_chosen, reward_rejected = self.rewards(pairs)
        margins = reward_chosen - reward_rejected
        return -log_sigmoid(margins), -log_sigmoid(-margins)


class Cdpo(LabelNoise):
    """Conservative DPO: smoothed labels, a mix of both directions (ericmitchell.ai/cdpo.pdf)."""

    name: Literal["cdpo"] = "cdpo"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−(1−ε)·log σ(βh) − ε·log σ(−βh), h = Δ_w − Δ_l, equation 3."""
        right, wrong = self.both_ways(pairs)
        loss = (1 - self.label_smoothing) * right + self.label_smoothing * wrong
        return self.output(loss, pairs, self.rewards(pairs))


class Robust(LabelNoise):
    """DPO that is unbiased under label noise."""

    arxiv = "2403.00409"
    name: Literal["robust"] = "robust"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """[−(1−ε)·log σ(βh) + ε·log σ(−βh)] / (1−2ε), h = Δ_w − Δ_l."""
        right, wrong = self.both_ways(pairs)
        noise = self.label_smoothing
        loss = ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)
        return self.output(loss, pairs, self.rewards(pairs))


class Safedpo(Anchored):
    """DPO with a margin where exactly one response is unsafe.

    A pair of which only the rejected response is safe is swapped first, metrics included. A pair of two
    unsafe responses has no loss; training leaves it out before it plans its batches, and counts it (see
    `bdpo.scoring.selection`).
    """

    arxiv = "2505.20065"
    requires_safety_labels = True
    name: Literal["safedpo"] = "safedpo"
    safedpo_delta: float = Field(10.0, ge=0, description="the margin where exactly one response is unsafe")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(Δ_w − Δ_l) − (u_l − u_w)·`safedpo_delta`), u = 1 for an unsafe response."""
        chosen_unsafe, rejected_unsafe = pairs.chosen_unsafe.bool(), pairs.rejected_unsafe.bool()
        pairs = pairs.swapped(chosen_unsafe & ~rejected_unsafe)
        rewards = self.rewards(pairs)
        exactly_one_unsafe = chosen_unsafe ^ rejected_unsafe
        loss = -log_sigmoid(rewards[0] - rewards[1] - exactly_one_unsafe * self.safedpo_delta)
        output = self.output(loss, pairs, rewards)
        return replace(output, loss=output.loss.where(~(chosen_unsafe & rejected_unsafe), 0.0))


class Bpo(Anchored):
    """Balanced Preference Optimization: the worse of the two rewards is trained, not their difference."""

    arxiv = "2506.03557"
    name: Literal["bpo"] = "bpo"
    bpo_alpha: float = Field(0.3, gt=0, le=1, description="gap adaptor α: factor of the rejected reward")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·min(Δ_w, −`bpo_alpha`·Δ_l)).

        Where both are equal, as before the first update, either response gets half of the gradient, as in
        the authors' code (sunlin-ai/BPO, `balance_logistic_alpha`, with 0.3).
        """
        rewards = self.rewards(pairs)
        margins = rewards[0].minimum(-self.bpo_alpha * rewards[1])
        return self.output(-log_sigmoid(margins), pairs, rewards)


class CalDpo(Anchored):
    """Calibrated DPO: the log-ratios of the two responses are also drawn to ±1/(2β) by squared distances.

    The margin has no β, as in the authors' code (Cal-DPO/Cal-DPO, `preference_loss`, with β = 0.1).
    """

    arxiv = "2412.14516"
    own_metrics = ("calibration_loss",)
    name: Literal["cal_dpo"] = "cal_dpo"
    beta: float = Field(
        0.1, gt=0, description="the log-ratios are drawn to ±1/(2β); the scale of the rewards"
    )

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(Δ_w − Δ_l) + (Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²; ln 2 + 1/(2β²) before the first update."""
        delta_chosen, delta_rejected = pairs.deltas
        target = 1 / (2 * self.beta)
        calibration = (delta_chosen - target) ** 2 + (delta_rejected + target) ** 2
        loss = -log_sigmoid(delta_chosen - delta_rejected) + calibration
        return self.output(loss, pairs, self.rewards(pairs), calibration_loss=calibration)


AnyMethod = Annotated[
    Bdpo
    | DpoBw
    | DpoSf
    | Dpo
    | Dpop
    | Ipo
    | Cdpo
    | Robust
    | Safedpo
    | Bpo
    | CalDpo
    | Cpo
    | Simpo
    | Orpo
    | Sft,
    Discriminator("name"),
    default_kind("bdpo"),
]
"""The section `method` of a config."""

METHODS: dict[str, type[Method]] = {
    method.kind(): method for method in sections_in(AnyMethod) if issubclass(method, Method)
}
"""Every method by its name."""


def _weighted_dpo(
    method: Anchored,
    pairs: PairLogps,
    weights: tuple[torch.Tensor, torch.Tensor],
    on: Literal["margin", "gradient"] = "margin",
) -> LossOutput:
    """-log σ(β·(a_w·Δ_w - a_l·Δ_l)), or with the weights a on the gradients alone."""
    rewards = method.rewards(pairs)
    weigh = _weigh if on == "margin" else _weigh_gradient
    chosen, rejected = (weigh(reward, a) for reward, a in zip(rewards, weights, strict=True))
    margins = chosen - rejected
    balance = dict(zip(BALANCE_METRICS, (*weights, margins), strict=True))
    return method.output(-log_sigmoid(margins), pairs, rewards, **balance)


def _weigh(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x


def _weigh_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The value of x exactly, with `weight` times its gradient."""
    value = x.detach()
    return value + weight * (x - value)
