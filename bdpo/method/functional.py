"""Balanced DPO as plain functions of tensors, for training code of one's own.

`import bdpo` offers them: `bdpo.mutual_information`, `bdpo.balance_weights`, `bdpo.bdpo_loss`. A training by
`pipelines.train` calls the same method classes, so both give the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from bdpo.method.base import PairLogps
from bdpo.method.losses import Bdpo

if TYPE_CHECKING:
    import torch


class BdpoSettings(TypedDict, total=False):
    """The keys of `method.name=bdpo` (docs/methods.md), with the same defaults."""

    alpha: float
    beta: float
    balance: Literal["ratio", "softmax", "none"]
    sharpness: float
    mi_floor: float
    min_share: float
    balance_on: Literal["margin", "gradient"]


def balance_weights(
    mi_chosen: torch.Tensor, mi_rejected: torch.Tensor, **settings: Unpack[BdpoSettings]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_w, a_l), the weights of the two responses of each pair, α in all; all shapes (pairs,).

    `mi_chosen` and `mi_rejected` are the mutual information of query and response in nats per token, as
    `mutual_information` computes it from log-probs of the reference model.

    Raises:
        ValueError: a setting has no sense (pydantic's ValidationError names it).
    """
    return _method(settings).weights(mi_chosen, mi_rejected)


def bdpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    mi_chosen: torch.Tensor,
    mi_rejected: torch.Tensor,
    **settings: Unpack[BdpoSettings],
) -> torch.Tensor:
    """The loss of each pair: −log σ(β·(a_w·Δ_w − a_l·Δ_l)), arXiv 2603.22829; all shapes (pairs,).

    `policy_…` and `ref_…` are log π(y|x) of the policy and of the reference, summed over the tokens of the
    response, in nats; `mi_…` is the mutual information under the reference, nats per token.

    Raises:
        ValueError: a setting has no sense (pydantic's ValidationError names it).
    """
    method = _method(settings)
    weight_chosen, weight_rejected = method.weights(mi_chosen, mi_rejected)
    not_looked_at = policy_chosen.new_full(policy_chosen.shape, float("nan"))
    pairs = PairLogps(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=ref_chosen,
        reference_rejected=ref_rejected,
        chosen_tokens=not_looked_at,
        rejected_tokens=not_looked_at,
        weight_chosen=weight_chosen,
        weight_rejected=weight_rejected,
        chosen_unsafe=not_looked_at,
        rejected_unsafe=not_looked_at,
    )
    return method.loss(pairs).loss


def _method(settings: BdpoSettings) -> Bdpo:
    unknown = settings.keys() - BdpoSettings.__annotations__.keys()
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: not one of {', '.join(BdpoSettings.__annotations__)}"
        )
    return Bdpo(**settings)
