"""Every preference loss: a class with the keys that the loss looks at, and the loss itself.

A new loss is a class here and its name in `AnyMethod`. The symbols are those of `bdpo.method.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field

from bdpo.method.base import LossOutput, Method, PairLogps, log_sigmoid, loss_output
from bdpo.method.mi import Balanced
from bdpo.section import default_kind, sections_in

if TYPE_CHECKING:
    import torch


class Bdpo(Balanced):
    """DPO whose two sides are weighed by mutual information, α in all: Balanced DPO."""

    arxiv = "2603.22829"
    product_keys = ("alpha", "beta")
    name: Literal["bdpo"] = "bdpo"
    alpha: float = Field(1.5, gt=0, description="scaling factor: the total of the two weights")

    @property
    def strength(self) -> float:
        """The total of the two weights, α."""
        return self.alpha

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(a_w·Δ_w − a_l·Δ_l)) with a_w = α·ω_w and a_l = α·ω_l."""
        return _weighted_dpo(self, pairs, pairs.weight_chosen, pairs.weight_rejected)


class DpoBw(Balanced):
    """The ablation "DPO + balance weights": B-DPO without the scaling factor, weights of 1 in all."""

    arxiv = "2603.22829"
    name: Literal["dpo_bw"] = "dpo_bw"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(ω_w·Δ_w − ω_l·Δ_l)) with ω_w + ω_l = 1."""
        return _weighted_dpo(self, pairs, pairs.weight_chosen, pairs.weight_rejected)


class DpoSf(Method):
    """The ablation "DPO + scaling factor": both weights are α/2, whatever the mutual information."""

    arxiv = "2603.22829"
    product_keys = ("alpha", "beta")
    name: Literal["dpo_sf"] = "dpo_sf"
    alpha: float = Field(1.5, gt=0, description="scaling factor: the total of the two weights")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·α/2·(Δ_w − Δ_l))."""
        half = pairs.policy_chosen.new_full(pairs.policy_chosen.shape, self.alpha / 2)
        return _weighted_dpo(self, pairs, half, half)


class Dpo(Method):
    """Plain DPO."""

    arxiv = "2305.18290"
    name: Literal["dpo"] = "dpo"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(Δ_w − Δ_l)), equation 7."""
        one = pairs.policy_chosen.new_ones(pairs.policy_chosen.shape)
        return _weighted_dpo(self, pairs, one, one)


class Dpop(Method):
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
        return loss_output(-log_sigmoid(rewards[0] - rewards[1] - penalty), pairs, rewards)


class Ipo(Method):
    """Squared distance of the margin from 1/(2β), per token as in TRL."""

    arxiv = "2310.12036"
    name: Literal["ipo"] = "ipo"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """(Δ_w/|y_w| − Δ_l/|y_l| − 1/(2β))², equation 17."""
        delta_chosen, delta_rejected = pairs.deltas
        margins = delta_chosen / pairs.chosen_tokens - delta_rejected / pairs.rejected_tokens
        return loss_output((margins - 1 / (2 * self.beta)) ** 2, pairs, self.rewards(pairs))


class LabelNoise(Method):
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
        return loss_output(loss, pairs, self.rewards(pairs))


class Robust(LabelNoise):
    """DPO that is unbiased under label noise."""

    arxiv = "2403.00409"
    name: Literal["robust"] = "robust"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """[−(1−ε)·log σ(βh) + ε·log σ(−βh)] / (1−2ε), h = Δ_w − Δ_l."""
        right, wrong = self.both_ways(pairs)
        noise = self.label_smoothing
        loss = ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)
        return loss_output(loss, pairs, self.rewards(pairs))


class Safedpo(Method):
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
        return loss_output(loss.where(~(chosen_unsafe & rejected_unsafe), 0.0), pairs, rewards)


class Cpo(Method):
    """DPO against a uniform reference, plus the likelihood of the chosen response.

    As in TRL the likelihood term is per token; here of each pair, where TRL takes all tokens of a batch
    together, so that it does not depend on how a batch is split.
    """

    arxiv = "2401.08417"
    requires_reference = False
    name: Literal["cpo"] = "cpo"
    cpo_alpha: float = Field(1.0, ge=0, description="weight of the chosen response's likelihood")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(lp_w − lp_l)) − `cpo_alpha`·lp_w/|y_w|."""
        rewards = self.beta * pairs.policy_chosen, self.beta * pairs.policy_rejected
        nll = -pairs.policy_chosen / pairs.chosen_tokens
        loss = -log_sigmoid(rewards[0] - rewards[1]) + self.cpo_alpha * nll
        return loss_output(loss, pairs, rewards, nll_loss=nll)


class Simpo(Method):
    """−log σ of the margin per token beyond a target."""

    arxiv = "2405.14734"
    requires_reference = False
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="scale of the rewards, which are per token")
    simpo_gamma: float = Field(0.5, ge=0, description="the margin that rewards are to reach")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(lp_w/|y_w| − lp_l/|y_l|) − `simpo_gamma`), equation 6."""
        reward_chosen = self.beta * pairs.policy_chosen / pairs.chosen_tokens
        reward_rejected = self.beta * pairs.policy_rejected / pairs.rejected_tokens
        loss = -log_sigmoid(reward_chosen - reward_rejected - self.simpo_gamma)
        return loss_output(loss, pairs, (reward_chosen, reward_rejected))


class Sft(Method):
    """Supervised fine-tuning on the chosen response; the rejected one is logged beside it and not trained on.

    The likelihood is per token of each pair, as in `cpo`. The tamper test trains with it.
    """

    arxiv = "2203.02155"
    requires_reference = False
    name: Literal["sft"] = "sft"
    beta: float = Field(0.1, gt=0, description="scale of the logged rewards; the loss does not depend on it")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−lp_w/|y_w|, the likelihood alone."""
        rewards = self.beta * pairs.policy_chosen, self.beta * pairs.policy_rejected
        return loss_output(-pairs.policy_chosen / pairs.chosen_tokens, pairs, rewards)


AnyMethod = Annotated[
    Bdpo | DpoBw | DpoSf | Dpo | Dpop | Ipo | Cdpo | Robust | Safedpo | Cpo | Simpo | Sft,
    Discriminator("name"),
    default_kind("bdpo"),
]
"""The section `method` of a config."""

METHODS: dict[str, type[Method]] = {
    method.kind(): method for method in sections_in(AnyMethod) if issubclass(method, Method)
}
"""Every method by its name."""


def _weighted_dpo(
    method: Method, pairs: PairLogps, weight_chosen: torch.Tensor, weight_rejected: torch.Tensor
) -> LossOutput:
    """-log σ(β·(a_w·Δ_w - a_l·Δ_l))."""
    rewards = method.rewards(pairs)
    margins = weight_chosen * rewards[0] - weight_rejected * rewards[1]
    balance = {
        "balance/weight_chosen": weight_chosen,
        "balance/weight_rejected": weight_rejected,
        "balance/margins": margins,
    }
    return loss_output(-log_sigmoid(margins), pairs, rewards, **balance)
