"""Every architecture on the list of shared rows, and some that must not be on it, tiny and random."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import AutoConfig

from bdpo.models import architectures
from bdpo.models import logps as logps_module
from bdpo.models.architectures import switch_off_dropout, trains_as_it_scores
from bdpo.models.logps import LogpsModel
from bdpo.models.row_layout import SHARED_ROW_MODELS
from tests.support import ROOT
from tests.support.architectures import COMMON, NOT_TRAINED, OWN_LOGITS, PLAIN_ROWS, SPECIAL, tiny
from tests.support.helpers import VOCABULARY, encoded_pairs, logps_of, naive_logps

pytestmark = pytest.mark.long

EVERY = sorted([*SHARED_ROW_MODELS, *PLAIN_ROWS, *OWN_LOGITS, *NOT_TRAINED])

every_architecture = pytest.mark.parametrize("model_type", EVERY)

PAIRS = encoded_pairs([(1, 1, 1), (9, 1, 3), (5, 5, 5), (40, 23, 11), (2, 60, 1)])


@torch.no_grad()
@every_architecture
def test_log_probs_are_those_of_the_models_own_logits(model_type):
    model = tiny(model_type)
    naive = [
        naive_logps(model, [(pair.prompt, getattr(pair, side)) for pair in PAIRS])
        for side in ("chosen", "rejected")
    ]
    ours = LogpsModel(model, max_length=128)
    assert ours.layout.shared == (model_type in SHARED_ROW_MODELS)
    assert ours.chunked == (model_type not in OWN_LOGITS)
    for logps, exact in zip(logps_of(ours, PAIRS), naive, strict=True):
        torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)


@torch.no_grad()
def test_models_of_other_heads_make_the_logits_of_few_rows_at_a_time(monkeypatch):
    """And of what follows the prompts alone."""
    model, shapes = tiny("gemma2"), []
    pairs = encoded_pairs([(20, 3, 9), (25, 6, 1), (40, 5, 5)])
    model.register_forward_hook(lambda module, inputs, output: shapes.append(output.logits.shape[:2]))
    expected = logps_of(LogpsModel(model, max_length=128), pairs)
    for side, logps in zip(("chosen", "rejected"), expected, strict=True):
        exact = naive_logps(tiny("gemma2"), [(pair.prompt, getattr(pair, side)) for pair in pairs])
        torch.testing.assert_close(logps.double(), exact, rtol=1e-5, atol=0)
    width = 40 + 5
    assert shapes == [(6, width - (20 - 1))]
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 1)
    for some, whole in zip(logps_of(LogpsModel(model, max_length=128), pairs), expected, strict=True):
        torch.testing.assert_close(some, whole)
    assert shapes[1:] == [(1, width - (20 - 1))] * 6


def own_gradients(exact):
    """Of Σ log π(chosen) - 2 log π(rejected) by the model's own logits, a sequence at a time, float64."""
    exact.set_experts_implementation("eager")
    for pair in PAIRS:
        for scale, response in ((1, pair.chosen), (-2, pair.rejected)):
            logits = exact(torch.tensor([pair.prompt + response])).logits[0, len(pair.prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
            (scale * picked.sum()).backward()
    return {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}


@every_architecture
def test_training_mode_computes_the_same_twice_and_the_gradients_of_autograd(model_type, monkeypatch):
    """With every kind of dropout that its config has, which must be off; with several chunks of logits."""
    if model_type in NOT_TRAINED:
        pytest.skip("refused for training")
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    model = tiny(model_type, dropout=0.3)
    exported = model.config.to_dict()
    expected = own_gradients(copy.deepcopy(model).double())
    switch_off_dropout(model)
    ours = LogpsModel(model.train(), max_length=128, one_forward=True)
    chosen, rejected = logps_of(ours, PAIRS)
    again = torch.stack(logps_of(ours, PAIRS))
    assert torch.equal(torch.stack([chosen, rejected]), again)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(logps_of(ours.eval(), PAIRS)), again)
    (chosen - 2 * rejected).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():  # the biases of keys have none but rounding
        scale = max(gradient.abs().max().item(), 0.01 * largest)
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=2e-5 * scale, msg=name)
    assert model.config.to_dict() == exported


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "llama"])
def test_bfloat16_beside_a_residual_stream_of_float32(model_type):
    logps, _ = logps_of(LogpsModel(tiny(model_type).bfloat16(), max_length=128), PAIRS)
    exact, _ = logps_of(LogpsModel(tiny(model_type), max_length=128), PAIRS)
    torch.testing.assert_close(logps, exact, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt", "falcon", *NOT_TRAINED])
def test_whether_training_computes_what_scoring_does_is_found_out(model_type):
    assert trains_as_it_scores(tiny(model_type, dropout=0.3).config) == (model_type not in NOT_TRAINED)


@pytest.mark.parametrize("model_type", ["cohere", "gemma2"])
def test_one_forward_whatever_the_size_of_the_batch(model_type, monkeypatch):
    """Workers of ZeRO-3 wait for each other in every forward; with gradients and without."""
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 1)
    model, forwards = tiny(model_type), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    ours = LogpsModel(model, max_length=128, one_forward=True)
    for pairs in (PAIRS, PAIRS[:1]):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                logps_of(ours, pairs)
    assert len(forwards) == 4


def test_a_micro_batch_of_a_training_is_one_forward_of_a_model_of_another_head(monkeypatch):
    """Under ZeRO 3 workers that made different numbers of forwards would wait for each other for ever."""
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 1)
    model, forwards = tiny("gemma2"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    logps_of(LogpsModel(model, max_length=128), PAIRS)
    assert len(forwards) == 1


@pytest.mark.parametrize("state", ["meta device", "another random state"])
def test_a_plain_lm_head_is_recognised_wherever_the_model_is_made(state):
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


def test_the_documents_table_is_of_these_architectures():
    """docs/architectures.md: a row for each way in which architectures are treated."""
    table = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip(): set(re.findall(r"`([a-z0-9_]+)`", line.split("|")[2]))
        for line in table.splitlines()
        if line.startswith("| ")
    }
    assert rows["Shared rows"] == SHARED_ROW_MODELS
    assert rows["Plain rows"] == set(PLAIN_ROWS)
    assert rows["Own logits"] == set(OWN_LOGITS)
    assert rows["Scored, not trained"] == set(NOT_TRAINED)
