"""Models of every architecture, tiny and random."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo.models.transformers_private import supports_sdpa
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
    # the derivative of its ReLU jumps at 0, where float32 and float64 may be on different sides
    "opt": {"activation_function": "gelu"},
    "gemma": GROUPED | {"head_dim": 8},
    # not on the list: experts, positions from the mask, state space
    "mixtral": GROUPED | {"num_local_experts": 3},
    "qwen2_moe": GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen3_moe": GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
    # its default widths take seconds a forward where its kernels are not installed
    "falcon_h1": GROUPED
    | {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    # capped logits, scaled logits
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": GROUPED | {"logit_scale": 0.25},
    "granite": GROUPED | {"logits_scaling": 4.0},
}


OWN_LOGITS = ["cohere", "cohere2", "cwm", "falcon_h1", "gemma2", "granite", "llama4_text"]
"""Architectures whose logits are not, or not surely, their head applied to their last hidden state."""

PLAIN_ROWS = [
    "apertus", "arcee", "biogpt", "bloom", "ernie4_5", "exaone4", "falcon", "falcon_mamba", "gemma3_text",
    "glm", "glm4", "gpt_bigcode", "gpt_oss", "granitemoe", "jetmoe", "lfm2", "mamba", "mixtral", "mpt",
    "nemotron", "olmo", "olmo3", "olmoe", "opt", "persimmon", "phi", "qwen2_moe", "qwen3_moe", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
"""Architectures with a plain head that are not known to take a custom mask."""

NOT_TRAINED = ["phimoe"]
"""Architectures that compute something else in training mode."""


def tiny(model_type, dropout=0.0):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | SPECIAL.get(model_type, GROUPED))
    for name, value in vars(config).items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, dropout)
    attention = "sdpa" if supports_sdpa(config) else "eager"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
