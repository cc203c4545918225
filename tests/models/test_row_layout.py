"""How rows are laid out is decided once, for scoring, training and the plans of both."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from bdpo.models.logps import LogpsModel
from bdpo.models.row_layout import RowLayout, prefix_sharing_obstacle, row_layout


class ScaledLogits(LlamaConfig):
    """A config of an architecture that transformers does not build: its own logits are used."""


def test_models_whose_own_logits_are_used_get_plain_rows_everywhere():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    sizes |= {"num_attention_heads": 2}
    for kind, shared in ((LlamaConfig, True), (ScaledLogits, False)):
        hf_config = kind(**sizes, attn_implementation="sdpa")
        model = LogpsModel(LlamaForCausalLM(hf_config), 32)
        assert model.layout == row_layout(hf_config, 32) == RowLayout(8, shared)
        assert row_layout(hf_config, 32, 1) == RowLayout(8, shared, 1)
    assert "own logits" in prefix_sharing_obstacle(hf_config, 32)
