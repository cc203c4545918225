"""Every architecture on the list of shared rows, and some that must not be on it, tiny and random."""

import pytest
import torch
from helpers import VOCABULARY, encoded_pairs, naive_logps
from transformers import AutoConfig, AutoModelForCausalLM

from bdpo import logps as logps_module
from bdpo.logps import SHARED_ROW_MODELS, LogpsModel, pair_logps

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
    # not on the list: capped logits, scaled logits, positions from the mask, state space
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": GROUPED | {"logit_scale": 0.25},
    "granite": GROUPED | {"logits_scaling": 4.0},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
}
PAIRS = encoded_pairs([(1, 1, 1), (9, 1, 3), (5, 5, 5), (40, 23, 11), (2, 60, 1)])


def tiny(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | SPECIAL.get(model_type, GROUPED))
    return AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(SHARED_ROW_MODELS | SPECIAL.keys()))
def test_log_probs_are_those_of_the_models_own_logits(model_type):
    model = tiny(model_type)
    naive = [
        naive_logps(model, [(pair.prompt, getattr(pair, side)) for pair in PAIRS])
        for side in ("chosen", "rejected")
    ]
    ours = LogpsModel(model, max_length=128)
    assert ours.shared_rows == (model_type in SHARED_ROW_MODELS)
    for logps, exact in zip(pair_logps(ours, PAIRS), naive, strict=True):
        torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)


@torch.no_grad()
def test_models_of_other_heads_make_the_logits_of_few_rows_at_a_time(monkeypatch):
    model, rows = tiny("gemma2"), []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.logits)))
    expected = pair_logps(LogpsModel(model, max_length=128), PAIRS)
    assert rows == [2 * len(PAIRS)]
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 1)
    for some, whole in zip(pair_logps(LogpsModel(model, max_length=128), PAIRS), expected, strict=True):
        torch.testing.assert_close(some, whole)
    assert rows[1:] == [1] * 2 * len(PAIRS)
