"""The preference losses that look at no reference model. The symbols are those of `bdpo.method.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from bdpo.method.base import (
    Anchored,
    LossOutput,
    Method,
    PairLogps,
    Preference,
    Side,
    log_sigmoid,
    loss_output,
)

if TYPE_CHECKING:
    import torch


class Cpo(Preference):
    """DPO against a uniform reference, plus the likelihood of the chosen response.

    As in TRL the likelihood term is per token; here of each pair, where TRL takes all tokens of a batch
    together, so that it does not depend on how a batch is split.
    """

    arxiv = "2401.08417"
    requires_reference = False
    own_metrics = ("nll_loss",)
    name: Literal["cpo"] = "cpo"
    cpo_alpha: float = Field(1.0, ge=0, description="weight of the chosen response's likelihood")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(lp_w − lp_l)) − `cpo_alpha`·lp_w/|y_w|."""
        rewards = self.beta * pairs.policy_chosen, self.beta * pairs.policy_rejected
        nll = -pairs.mean_logps[0]
        loss = -log_sigmoid(rewards[0] - rewards[1]) + self.cpo_alpha * nll
        return loss_output(loss, pairs, rewards, nll_loss=nll)


class Simpo(Anchored):
    """−log σ of the margin per token beyond a target."""

    arxiv = "2405.14734"
    requires_reference = False
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="scale of the rewards, which are per token")
    simpo_gamma: float = Field(0.5, ge=0, description="the margin that rewards are to reach")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−log σ(β·(lp_w/|y_w| − lp_l/|y_l|) − `simpo_gamma`), equation 6."""
        chosen, rejected = pairs.mean_logps
        reward_chosen, reward_rejected = self.beta * chosen, self.beta * rejected
        loss = -log_sigmoid(reward_chosen - reward_rejected - self.simpo_gamma)
        return self.output(loss, pairs, (reward_chosen, reward_rejected))


class Sft(Method):
    """Supervised fine-tuning on the chosen response; the rejected one is not forwarded.

    The likelihood is per token of each pair, as in `cpo`. The tamper test trains with it.
    """

    arxiv = "2203.02155"
    requires_reference = False
    responses: ClassVar[tuple[Side, ...]] = ("chosen",)
    own_metrics = ("logps/chosen",)
    name: Literal["sft"] = "sft"

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−lp_w/|y_w|, the likelihood alone."""
        return LossOutput(-pairs.mean_logps[0], {"logps/chosen": pairs.policy_chosen.detach()})


class Orpo(Preference):
    """Likelihood of the chosen response, and the odds of the two responses against each other, in one loss.

    As in TRL the probability p of a response is the geometric mean over its tokens. The likelihood term is
    of the response alone, and per token of each pair; TRL takes the prompt and all tokens of a batch with it.
    """

    arxiv = "2403.07691"
    requires_reference = False
    own_metrics = ("nll_loss", "log_odds_chosen", "log_odds_ratio")
    name: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="weight λ of the odds ratio; the scale of the logged rewards")

    def loss(self, pairs: PairLogps) -> LossOutput:
        """−lp_w/|y_w| − β·log σ(log odds(y_w) − log odds(y_l)), odds = p/(1 − p), p = exp(lp/|y|)."""
        chosen, rejected = pairs.mean_logps
        log_odds = _log_odds(chosen) - _log_odds(rejected)
        log_ratio = log_sigmoid(log_odds)
        rewards = self.beta * chosen, self.beta * rejected
        odds = {"log_odds_chosen": log_odds, "log_odds_ratio": log_ratio}
        return loss_output(-chosen - self.beta * log_ratio, pairs, rewards, nll_loss=-chosen, **odds)


def _log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)); finite where rounding makes a response certain, with p at most 1 - ε of its dtype."""
    import torch

    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - (-log_p.expm1()).log()
