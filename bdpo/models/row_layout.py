"""How the rows of a batch are laid out for a model: decided here for scoring, training and their plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bdpo.models.architectures import has_plain_lm_head
from bdpo.models.arrangement import arrange, grid_cost
from bdpo.models.packing import Batch, PrefixGroups, pack, pack_plain
from bdpo.models.transformers_private import attention_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Architectures known to take a 4-D mask and restarted positions. Every one of them is run
# by `tests/models/test_architectures.py`.
SHARED_ROW_MODELS = frozenset(
    ["gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"]
)


@dataclass(frozen=True)
class RowLayout:
    """How a model of this width takes prefix groups: one shared row for each, or a plain one per response."""

    hidden_size: int
    shared: bool
    responses: int = 2
    """How many responses of each pair are forwarded."""

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """What groups of these lengths, (groups, 1 + responses), take of a grid, int64, (groups,).

        The context once, or one row per response, all as long as the longest. The unit of the lengths below.
        """
        if self.shared:
            return lengths.sum(1, dtype=np.int64)
        responses = lengths[:, 1:]
        return responses.shape[1] * (lengths[:, 0].astype(np.int64) + responses.max(1))

    def pack(self, groups: PrefixGroups) -> Batch:
        """The groups as one batch of rows, on the host."""
        return pack(groups, self.hidden_size) if self.shared else pack_plain(groups)

    def grid(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(rows, width) of a batch of pairs of these lengths."""
        if not self.shared:
            return self.responses * len(lengths), max(lengths, default=0) // self.responses
        rows = arrange(lengths, 0, self.hidden_size) if lengths else []
        return len(rows), max((sum(lengths[index] for index in row) for row in rows), default=0)

    def fits(self, lengths: Sequence[int], tokens: int) -> bool:
        """Whether the grid of a batch has at most so many tokens; one pair always counts as fitting."""
        # The grid has at most one row per pair, see `arrange`: that is cheap to compute and mostly enough.
        return (
            len(lengths) <= 1
            or len(lengths) * max(lengths) <= tokens
            or math.prod(self.grid(lengths)) <= tokens
        )

    def cost(self, lengths: Sequence[int]) -> float:
        """Operations of the grid of a batch, see `grid_cost`."""
        return grid_cost(*self.grid(lengths), self.hidden_size)


def prefix_sharing_obstacle(hf_config: PreTrainedConfig, max_length: int) -> str | None:
    """Why rows cannot be shared in this model, or None; a function of its config.json alone.

    A 4-D mask takes the place of a sliding window, which is right as long as no sequence of `max_length`
    tokens is longer than the window. State-space and linear-attention layers look at no mask at all,
    eager and flash attention take other masks: all models that nobody has looked at get plain rows. So do
    models whose own logits are used, see `bdpo.models.logps.LogpsModel`.
    """
    if hf_config.model_type not in SHARED_ROW_MODELS:
        return f"{hf_config.model_type} models are not known to take a custom mask"
    window = getattr(hf_config, "sliding_window", None)
    if window is not None and window < max_length:
        return f"the sliding window of {window} tokens is shorter than data.max_length={max_length}"
    attention = attention_of_config(hf_config)
    if attention not in ("sdpa", "flex_attention"):
        return f"model.attn_implementation={attention} takes no custom mask"
    if not has_plain_lm_head(hf_config):
        return f"of this {hf_config.model_type} model the own logits are used"
    return None


def row_layout(hf_config: PreTrainedConfig, max_length: int, responses: int = 2) -> RowLayout:
    """The rows of a model with this config.json, of whose pairs so many responses are forwarded."""
    shared = prefix_sharing_obstacle(hf_config, max_length) is None
    return RowLayout(hf_config.get_text_config().hidden_size, shared, responses)
