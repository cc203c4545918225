"""CHES against its definition, written out for one pair at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch

from bdpo.method.ches import ches
from bdpo.models.logps import LogpsModel, mean_states
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout
from bdpo.scoring.reference import reference_logps
from tests.support.architectures import tiny
from tests.support.helpers import encoded_pairs

SHAPES = [(1, 1, 1), (9, 1, 3), (5, 5, 5), (40, 23, 11), (2, 60, 1)]


def naive(model, pair):
    """Definition 2: sums over tokens, each divided by the length of its response."""

    def mean(response):
        ids = torch.tensor([[*pair.prompt, *response]])
        states = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        return states[len(pair.prompt) - 1 : -1].sum(0) / len(response)

    chosen, rejected = mean(pair.chosen), mean(pair.rejected)
    return float(chosen @ rejected - chosen @ chosen)


@torch.no_grad()
@pytest.mark.parametrize("shared_rows", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "gemma", "qwen3_moe"])
def test_it_is_what_its_definition_says(model_type, shared_rows):
    model, pairs = tiny(model_type), encoded_pairs(SHAPES)
    expected = torch.tensor([naive(model, pair) for pair in pairs])
    ours = LogpsModel(model, 128)
    ours.layout = RowLayout(ours.layout.hidden_size, shared_rows and ours.layout.shared)
    _, alike = reference_logps(ours, PrefixGroups.of(pairs), [1, 2], 150)
    torch.testing.assert_close(alike, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_of_an_architecture_whose_logits_are_not_its_heads_it_is_not_known():
    _, alike = reference_logps(
        LogpsModel(tiny("gemma2"), 128), PrefixGroups.of(encoded_pairs(SHAPES)), [1, 2], 150
    )
    assert all(map(math.isnan, alike))


def test_the_same_response_twice_is_as_alike_as_can_be():
    state = torch.tensor([[1.0, -2.0]])
    assert ches(state, state) == 0
    assert ches(state, -state) == -10


def test_means_are_over_the_tokens_of_each_response():
    states = torch.tensor([[1.0], [3.0], [10.0]]).bfloat16()
    means = mean_states(states, torch.tensor([0, 0, 1]), 2)
    assert means.tolist() == [[2.0], [10.0]]
    assert means.dtype == torch.float32
