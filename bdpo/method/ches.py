"""CHES, the centred hidden embedding similarity of the two responses of a pair, and means for it.

From "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization"
(arXiv 2410.08847, Definition 2, in its length-normalised form): pairs whose responses the model sees as
alike are those in whose training the preferred response loses probability, too.
"""

from __future__ import annotations

import torch


def ches(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """⟨h_w, h_l⟩ − ‖h_w‖², the higher the more alike; shape (pairs,), float32.

    `chosen` and `rejected`, (pairs, hidden size), are the means over a response of the last hidden states
    that predict its tokens: the states behind c(x) and all tokens of the response but its last.
    """
    return ((rejected - chosen) * chosen).sum(-1)
