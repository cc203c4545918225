"""Branches of one context, in shared rows and in plain ones, against one sequence at a time in float64."""

from __future__ import annotations

import random

import pytest
import torch

from bdpo.models.branches import Branch
from bdpo.models.logps import LogpsModel
from bdpo.models.row_layout import SHARED_ROW_MODELS, RowLayout
from tests.support.architectures import tiny
from tests.support.helpers import VOCABULARY, naive_logps, tiny_qwen2

SHAPES = [
    (12, [(3, 5, 2)]),
    (30, [(n % 29 + 1, 4 + n % 7, 1 + n % 3) for n in range(40)]),
    (1, [(1, 3, 2)] * 3),
]


CASES = [("qwen2", shape, shared) for shape in SHAPES for shared in (True, False)]
CASES += [(model_type, SHAPES[1], True) for model_type in sorted(SHARED_ROW_MODELS)]


@pytest.mark.parametrize(("model_type", "shape", "shared"), CASES)
def test_log_probs_are_those_of_the_sequences(model_type, shape, shared) -> None:
    rng = random.Random(0)
    context = [rng.randrange(VOCABULARY) for _ in range(shape[0])]
    branches = [
        Branch(start, [rng.randrange(VOCABULARY) for _ in range(length)], scored)
        for start, length, scored in shape[1]
    ]
    rows = [([*context[: b.start], *b.ids[: -b.scored]], list(b.ids[-b.scored :])) for b in branches]
    expected = naive_logps(tiny(model_type), rows)
    model = LogpsModel(tiny(model_type), 200)
    assert model.layout.shared
    model.layout = RowLayout(model.layout.hidden_size, shared)
    with torch.no_grad():
        found = model.branch_logps(context, branches)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-5)


def test_what_branches_share_is_forwarded_once() -> None:
    branches = [Branch(50, [1] * 5, 2) for _ in range(16)]
    model = LogpsModel(tiny_qwen2(), 200)
    with torch.no_grad():
        model.branch_logps([2] * 50, branches)
    assert model.tokens_forwarded == 50 + 16 * 4  # no branch's last token predicts anything
