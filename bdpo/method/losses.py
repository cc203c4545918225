"""Preference losses: pure functions of log-probabilities, and their registry.

w is the chosen response, l the rejected one; lp = log π(y|c(x)) and Δ = lp - log π_ref(y|c(x)), summed over
response tokens, of which there are |y|; h = Δ_w - Δ_l. Every tensor has shape (pairs,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from bdpo.config import MethodConfig


@dataclass(frozen=True)
class PairLogps:
    """What a loss may look at, each of shape (pairs,): log-probs in nats, counts, weights, labels.

    What the method has no need of may be NaN: the reference's log-probs and the weights were never made.
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


@dataclass(frozen=True)
class LossOutput:
    """The loss of each pair and what is logged of it, every tensor of shape (pairs,).

    Rewards are β·Δ whatever the weights, so that curves of all methods compare; without a reference they
    are what TRL's are, β·lp (CPO) and β·lp/|y| (SimPO).
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


LossFn = Callable[[PairLogps, MethodConfig], LossOutput]


def dpo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """-log σ(β·(Δ_w - Δ_l)): plain DPO, arXiv 2305.18290 equation 7."""
    one = torch.ones_like(pairs.policy_chosen)
    return _weighted_dpo(pairs, one, one, method)


def bdpo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """-log σ(β·(a_w·Δ_w - a_l·Δ_l)) with a_w + a_l = α: B-DPO, arXiv 2603.22829."""
    return _weighted_dpo(pairs, pairs.weight_chosen, pairs.weight_rejected, method)


def dpo_bw(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """Ablation "DPO + balance weights": B-DPO without the scaling factor, a_w + a_l = 1."""
    return _weighted_dpo(
        pairs, pairs.weight_chosen / method.alpha, pairs.weight_rejected / method.alpha, method
    )


def dpo_sf(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """Ablation "DPO + scaling factor": both weights α/2, whatever the mutual information."""
    half = torch.full_like(pairs.policy_chosen, method.alpha / 2)
    return _weighted_dpo(pairs, half, half, method)


def ipo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """(Δ_w/|y_w| - Δ_l/|y_l| - 1/(2β))²: IPO, arXiv 2310.12036 equation 17, per token as in TRL."""
    delta_chosen, delta_rejected = _deltas(pairs)
    margins = delta_chosen / pairs.chosen_tokens - delta_rejected / pairs.rejected_tokens
    return _output((margins - 1 / (2 * method.beta)) ** 2, pairs, *_rewards(pairs, method))


def cdpo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """-(1-ε)·log σ(βh) - ε·log σ(-βh): conservative DPO, labels wrong with probability ε = `label_smoothing`.

    Source: ericmitchell.ai/cdpo.pdf equation 3.
    """
    right, wrong, rewards = _both_ways(pairs, method)
    loss = (1 - method.label_smoothing) * right + method.label_smoothing * wrong
    return _output(loss, pairs, *rewards)


def robust(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """[-(1-ε)·log σ(βh) + ε·log σ(-βh)] / (1-2ε): the unbiased DPO loss under label noise ε.

    Source: arXiv 2403.00409.
    """
    right, wrong, rewards = _both_ways(pairs, method)
    noise = method.label_smoothing
    return _output(((1 - noise) * right - noise * wrong) / (1 - 2 * noise), pairs, *rewards)


def cpo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """-log σ(β·(lp_w - lp_l)) - `cpo_alpha`·lp_w/|y_w|: CPO, arXiv 2401.08417.

    As in TRL the likelihood term is per token; here of each pair, where TRL takes all tokens of a batch
    together, so that it does not depend on how a batch is split.
    """
    rewards = method.beta * pairs.policy_chosen, method.beta * pairs.policy_rejected
    nll = -pairs.policy_chosen / pairs.chosen_tokens
    loss = -F.logsigmoid(rewards[0] - rewards[1]) + method.cpo_alpha * nll
    return _output(loss, pairs, *rewards, nll_loss=nll)


def simpo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """-log σ(β·(lp_w/|y_w| - lp_l/|y_l|) - γ), γ = `simpo_gamma`: SimPO, arXiv 2405.14734 equation 6."""
    reward_chosen = method.beta * pairs.policy_chosen / pairs.chosen_tokens
    reward_rejected = method.beta * pairs.policy_rejected / pairs.rejected_tokens
    loss = -F.logsigmoid(reward_chosen - reward_rejected - method.simpo_gamma)
    return _output(loss, pairs, reward_chosen, reward_rejected)


def safedpo(pairs: PairLogps, method: MethodConfig) -> LossOutput:
    """-log σ(βh - (u_l - u_w)·`safedpo_delta`), u = 1 for an unsafe response: SafeDPO, arXiv 2505.20065.

    A pair of which only the rejected response is safe is turned round first, metrics included; one of two
    unsafe responses has no loss (training leaves it out before it plans its batches, see
    bdpo.scoring.selection).
    """
    chosen_unsafe, rejected_unsafe = pairs.chosen_unsafe.bool(), pairs.rejected_unsafe.bool()
    pairs = _turned_round(pairs, chosen_unsafe & ~rejected_unsafe)
    rewards = _rewards(pairs, method)
    only_rejected_unsafe = chosen_unsafe ^ rejected_unsafe
    loss = -F.logsigmoid(rewards[0] - rewards[1] - only_rejected_unsafe * method.safedpo_delta)
    return _output(loss.where(~(chosen_unsafe & rejected_unsafe), 0.0), pairs, *rewards)


LOSSES: dict[str, LossFn] = {
    loss.__name__: loss for loss in (bdpo, dpo, dpo_bw, dpo_sf, ipo, cdpo, robust, cpo, simpo, safedpo)
}

REFERENCE_FREE = frozenset({"cpo", "simpo"})  # these are trained without scores

NEED_SAFETY_LABELS = frozenset({"safedpo"})


def _weighted_dpo(
    pairs: PairLogps, weight_chosen: torch.Tensor, weight_rejected: torch.Tensor, method: MethodConfig
) -> LossOutput:
    reward_chosen, reward_rejected = _rewards(pairs, method)
    margins = weight_chosen * reward_chosen - weight_rejected * reward_rejected
    balance = {
        "balance/weight_chosen": weight_chosen,
        "balance/weight_rejected": weight_rejected,
        "balance/margins": margins,
    }
    return _output(-F.logsigmoid(margins), pairs, reward_chosen, reward_rejected, **balance)


def _both_ways(
    pairs: PairLogps, method: MethodConfig
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """-log σ(βh), -log σ(-βh): DPO if the label is right, and if it is wrong; and the rewards."""
    rewards = _rewards(pairs, method)
    margins = rewards[0] - rewards[1]
    return -F.logsigmoid(margins), -F.logsigmoid(-margins), rewards


def _deltas(pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected


def _rewards(pairs: PairLogps, method: MethodConfig) -> tuple[torch.Tensor, torch.Tensor]:
    delta_chosen, delta_rejected = _deltas(pairs)
    return method.beta * delta_chosen, method.beta * delta_rejected


def _turned_round(pairs: PairLogps, which: torch.Tensor) -> PairLogps:
    """Chosen and rejected exchanged where `which` is True."""
    columns: dict[str, torch.Tensor] = {}
    for chosen in (field.name for field in fields(pairs) if "chosen" in field.name):
        rejected = chosen.replace("chosen", "rejected")
        one, other = getattr(pairs, chosen), getattr(pairs, rejected)
        columns |= {chosen: other.where(which, one), rejected: one.where(which, other)}
    return PairLogps(**columns)


def _output(
    loss: torch.Tensor,
    pairs: PairLogps,
    reward_chosen: torch.Tensor,
    reward_rejected: torch.Tensor,
    **more: torch.Tensor,
) -> LossOutput:
    metrics = {
        "rewards/chosen": reward_chosen,
        "rewards/rejected": reward_rejected,
        "rewards/margins": reward_chosen - reward_rejected,
        "rewards/accuracies": (reward_chosen > reward_rejected).float(),
        "logps/chosen": pairs.policy_chosen,
        "logps/rejected": pairs.policy_rejected,
        **more,
    }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})
