"""Mutual information between query and response, and the balance weights made of it.

Source: B-DPO, arXiv 2603.22829. The response that the reference already understands better is
optimised less; alpha is the total of the two weights. The exact form of the shares is our reading of
the paper, hence the named rules.
"""

from __future__ import annotations

import torch

from bdpo.config import MethodConfig


def mutual_information(
    cond_logps: torch.Tensor, uncond_logps: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """I(x;y) = [log π_ref(y|c(x)) - log π_ref(y|c(∅))] / |y|, nats per token; all shapes (pairs,)."""
    return (cond_logps - uncond_logps) / num_tokens


def balance_weights(
    mi_chosen: torch.Tensor, mi_rejected: torch.Tensor, method: MethodConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_w, a_l) of each pair, a_w + a_l = alpha; inputs in nats per token, all shapes (pairs,).

    With γ = `sharpness` and s = max(I, mi_floor), the share of the chosen response is
    `ratio`: s_l^γ / (s_w^γ + s_l^γ) = σ(γ·(ln s_l - ln s_w)); `softmax`: σ(γ·(I_l - I_w)); `none`: ½.
    Both shares are kept within [min_share, 1 - min_share].
    """
    if method.balance == "none":
        share_chosen = torch.full_like(mi_chosen, 0.5)
    elif method.balance == "softmax":
        share_chosen = torch.sigmoid(method.sharpness * (mi_rejected - mi_chosen))
    else:
        log_chosen, log_rejected = (mi.clamp(min=method.mi_floor).log() for mi in (mi_chosen, mi_rejected))
        share_chosen = torch.sigmoid(method.sharpness * (log_rejected - log_chosen))
    share_chosen = share_chosen.clamp(method.min_share, 1 - method.min_share)
    return method.alpha * share_chosen, method.alpha * (1 - share_chosen)
