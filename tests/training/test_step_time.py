"""The modelled step: its counts against torch's counter and against sums made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from bdpo.config import parse_config
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.transformers_private import set_attention
from bdpo.training import step_time as model
from bdpo.training.memory import KNOWN_SHAPES
from benchmarks.common import flops

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


def modelled(**train):
    # Without ZeRO the parameters are their own float32 masters.
    dtype = "bfloat16" if train.get("zero_stage", 3) else "float32"
    values = {"run_dir": "r", "model": {"name_or_path": "m", "dtype": dtype}, "data": {"path": "p"}}
    train = {"workers": 8, "gradient_checkpointing": False} | train
    known = dict(KNOWN_SHAPES["Qwen/Qwen2-7B-Instruct"])
    del known["model_type"]
    shape = Qwen2Config(**known)
    set_attention(shape, "sdpa")  # shared rows
    return model.step_time(parse_config(values | {"train": train}, "test"), shape)


def test_operations_of_a_forward_are_those_that_torch_counts():
    shape = Qwen2Config(**SHAPE)
    layers = Qwen2Model(shape)
    multiplying = sum(p.numel() for p in layers.layers.parameters() if p.ndim == 2)
    counted, tokens = flops(layers, lambda: layers(input_ids=torch.ones(2, 10, dtype=torch.long)))
    assert tokens == 20
    assert model.forward_operations(shape, multiplying, tokens, 10) == counted


@pytest.mark.parametrize(
    ("stage", "batch", "times"),
    [(0, 64, 2), (1, 64, 2), (2, 64, 2), (3, 64, 3), (2, 640, 3), (3, 640, 6)],
)
def test_communication_is_a_multiple_of_the_weights(stage, batch, times):
    """8 pairs of 300 tokens a worker are one micro-step of 16,384 tokens, 80 are two."""
    weights = (2 if stage else 4) * 7_615_616_512
    found = modelled(zero_stage=stage, global_batch_size=batch)
    assert found.communication == pytest.approx(times * weights * 7 / 8)
    assert modelled(zero_stage=stage, workers=1).communication == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_share_of_an_estimation_is_what_torch_counts(checkpointing):
    """Two forwards of pairs as long as the model's, against forward and backward; attention is 4 % of it."""
    wide = {"num_hidden_layers": 1, "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 4096}
    shape = Qwen2Config(**SHAPE | wide)
    set_attention(shape, "sdpa")
    language_model = Qwen2ForCausalLM(shape).train()
    if checkpointing:
        language_model.gradient_checkpointing_enable()
    logps = LogpsModel(language_model, sum(model.PAIR))
    rng = np.random.default_rng(0)
    pairs = PrefixGroups.of([[rng.integers(1000, size=n) for n in model.PAIR] for _ in range(4)])
    given, alone = (logps.layout.pack(groups) for groups in (pairs, pairs.behind([1, 2])))

    def estimate():
        with torch.no_grad():
            logps(given), logps(alone)

    estimation, training = (
        flops(language_model, work)[0] for work in (estimate, lambda: logps(given).sum().backward())
    )
    values = {"run_dir": "r", "model": {"name_or_path": "m"}, "data": {"path": "p"}}
    train = {"gradient_checkpointing": checkpointing}
    share = model.estimation_share(parse_config(values | {"train": train}, "test"), shape)
    assert share == pytest.approx(estimation / training, rel=0.06)


def test_the_step_is_the_longest_of_what_overlaps():
    step = modelled()
    assert (step.tokens, step.micro_steps) == (8 * 300, 1)
    assert step.seconds == max(step.gpu, step.host, step.network)
    slow = dataclasses.replace(step, host=100.0)
    assert slow.seconds == 100
    assert slow.mfu == pytest.approx(step.mfu * step.seconds / 100)
    assert step.required == pytest.approx(6 * (7_615_616_512 - 152064 * 3584) * 2400)


def test_what_a_setting_changes():
    step = modelled()
    again = modelled(gradient_checkpointing=True)
    assert 1.25 < again.operations / step.operations < 1.34  # the head is not computed again
    assert again.host > step.host
    assert modelled(zero_stage=2).host < step.host
    assert modelled(lora={"r": 8}).operations < 0.7 * step.operations
    assert modelled(global_batch_size=256).mfu > step.mfu
    assert modelled(workers=64).network > step.network  # over the network between nodes
