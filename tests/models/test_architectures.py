"""Every architecture on the list of shared rows, and some that must not be on it, tiny and random."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig

from bdpo.models import architectures
from bdpo.models import logps as logps_module
from bdpo.models.logps import SHARED_ROW_MODELS, LogpsModel, pair_logps
from tests.support.architectures import COMMON, SPECIAL, tiny
from tests.support.helpers import VOCABULARY, encoded_pairs, naive_logps

OTHER_HEADS = {"gemma2", "cohere", "granite"}

PAIRS = encoded_pairs([(1, 1, 1), (9, 1, 3), (5, 5, 5), (40, 23, 11), (2, 60, 1)])


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
    assert ours.chunked == (model_type not in OTHER_HEADS)
    for logps, exact in zip(pair_logps(ours, PAIRS), naive, strict=True):
        torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)


@torch.no_grad()
def test_models_of_other_heads_make_the_logits_of_few_rows_at_a_time(monkeypatch):
    """And of what follows the prompts alone."""
    model, shapes = tiny("gemma2"), []
    pairs = encoded_pairs([(20, 3, 9), (25, 6, 1), (40, 5, 5)])
    model.register_forward_hook(lambda module, inputs, output: shapes.append(output.logits.shape[:2]))
    expected = pair_logps(LogpsModel(model, max_length=128), pairs)
    for side, logps in zip(("chosen", "rejected"), expected, strict=True):
        exact = naive_logps(tiny("gemma2"), [(pair.prompt, getattr(pair, side)) for pair in pairs])
        torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)
    width = 40 + 5
    assert shapes == [(6, width - (20 - 1))]
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 1)
    for some, whole in zip(pair_logps(LogpsModel(model, max_length=128), pairs), expected, strict=True):
        torch.testing.assert_close(some, whole)
    assert shapes[1:] == [(1, width - (20 - 1))] * 6


def test_gradients_of_models_of_other_heads_are_those_of_autograd(monkeypatch):
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    model = tiny("gemma2")
    exact = copy.deepcopy(model).double()
    chosen, rejected = pair_logps(LogpsModel(model, max_length=128), PAIRS)
    (chosen - 2 * rejected).sum().backward()
    for pair in PAIRS:
        for scale, response in ((1, pair.chosen), (-2, pair.rejected)):
            logits = exact(torch.tensor([pair.prompt + response])).logits[0, len(pair.prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            (scale * picked.sum()).backward()
    gradients = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            gradients[name].grad.double(), parameter.grad, rtol=1e-5, atol=1e-5 * scale
        )


def test_a_micro_batch_of_a_training_is_one_forward_of_a_model_of_another_head(monkeypatch):
    """Under ZeRO 3 workers that made different numbers of forwards would wait for each other for ever."""
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 1)
    model, forwards = tiny("gemma2"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    pair_logps(LogpsModel(model, max_length=128), PAIRS)
    assert len(forwards) == 1


@pytest.mark.parametrize("state", ["meta device", "another random state"])
def test_what_a_head_says_is_found_out_wherever_the_model_is_made(state):
    architectures._has_plain_lm_head.cache_clear()
    before = torch.random.get_rng_state()
    for model_type in ("qwen3_moe", "gemma2"):
        shape = AutoConfig.for_model(model_type, **COMMON | SPECIAL[model_type])
        with torch.device("meta" if state == "meta device" else "cpu"):
            assert architectures.has_plain_lm_head(shape) == (model_type == "qwen3_moe")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_of_an_architecture_that_cannot_be_built_the_own_logits_count():
    parts = AutoConfig.for_model("gemma3")  # of text and pictures: all of it would be built
    assert not architectures.has_plain_lm_head(parts)
    assert not architectures.has_plain_lm_head(AutoConfig.for_model("t5"))
