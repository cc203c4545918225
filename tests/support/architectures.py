"""Models of every architecture, tiny and random."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.helpers import VOCABULARY

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GROUPED = {"num_key_value_heads": 2}


SPECIAL = {
    "gpt2": {"n_positions": 512},
    "gpt_neox": {},
    "gemma": GROUPED | {"head_dim": 8},
    # not on the list: experts, positions from the mask, state space
    "mixtral": GROUPED | {"num_local_experts": 3},
    "qwen2_moe": GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen3_moe": GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
    # capped logits, scaled logits
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": GROUPED | {"logit_scale": 0.25},
    "granite": GROUPED | {"logits_scaling": 4.0},
}


def tiny(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | SPECIAL.get(model_type, GROUPED))
    return AutoModelForCausalLM.from_config(config).float().eval()
