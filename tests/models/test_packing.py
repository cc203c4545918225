"""Rows and masks without any model: who sees whom, at which position, and how much padding that costs."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from bdpo.models.packing import PrefixGroup, arrange, length_sorted_batches, pack, pack_plain

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 500))
def test_every_row_once_and_within_the_budget(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


def test_rows_of_similar_length_share_a_batch():
    assert length_sorted_batches([2, 9, 3, 10], 20) == [[3, 1], [2, 0]]


def area(lengths, common, rows):
    return len(rows) * (common + max(sum(lengths[i] for i in row) for row in rows))


@given(LENGTHS, st.integers(0, 30), st.integers(1, 5000))
def test_rows_are_never_more_padded_than_one_group_each(lengths, common, hidden_size):
    rows = arrange(lengths, common, hidden_size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(rows)
    assert area(lengths, common, rows) <= len(lengths) * (common + max(lengths))


def test_long_rows_are_for_models_whose_attention_is_cheap_in_comparison():
    assert len(arrange([50] * 8, 20, hidden_size=1)) == 8
    assert len(arrange([50] * 8, 20, hidden_size=4096)) == 1  # seven contexts saved
    assert len(arrange([50] * 8, 0, hidden_size=4096)) == 8  # nothing to save
    lengths = [100, 90, 80, 70, 60, 50, 40, 30]
    assert area(lengths, 0, arrange(lengths, 0, hidden_size=4096)) <= 1.03 * sum(lengths)


GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=3)), min_size=1, max_size=8
)


@settings(deadline=None)
@given(GROUPS, st.booleans(), st.sampled_from([2, 4096]))
def test_every_response_token_is_predicted_from_its_context_and_what_precedes_it_alone(
    shapes, one_context, hidden_size
):
    """Walk from each predictor through the mask: what it sees, by position, is a prefix of [c | y]."""
    ids = iter(range(10**6))  # all different, so that ids say where a token came from
    common = [next(ids) for _ in range(shapes[0][0])]
    groups = [
        PrefixGroup(
            common if one_context else [next(ids) for _ in range(c)],
            [[next(ids) for _ in range(n)] for n in r],
        )
        for c, r in shapes
    ]
    rows = [(group.context, response) for group in groups for response in group.responses]
    for batch in (pack(groups, hidden_size), pack_plain(groups)):
        positions, mask = batch.position_ids, batch.attention_mask
        if positions is None:  # what a model makes of plain rows by itself
            width = batch.input_ids.shape[1]
            positions = torch.arange(width).expand_as(batch.input_ids)
            mask = torch.ones(width, width, dtype=torch.bool).tril() & mask[:, None, None]
        token = iter(range(len(batch.targets)))
        for number, (context, response) in enumerate(rows):
            for k in range(len(response)):
                n = next(token)
                row, column = divmod(batch.logit_positions[n].item(), batch.input_ids.shape[1])
                seen = mask[row, 0, column]
                order = positions[row][seen].argsort()
                assert batch.input_ids[row][seen][order].tolist() == [*context, *response][: len(context) + k]
                assert positions[row][seen][order].tolist() == list(range(len(context) + k))
                assert batch.input_ids[row, column] == [*context, *response][len(context) + k - 1]
                assert batch.targets[n] == response[k]
                assert batch.responses[n] == number
        assert mask.any(-1).all()  # a softmax over nothing is not a number


@settings(deadline=None, max_examples=10)
@given(
    st.lists(
        st.tuples(st.integers(1, 150), st.lists(st.integers(1, 200), min_size=1, max_size=3)),
        min_size=1, max_size=4,
    ),
    st.booleans(),
    st.sampled_from([2, 4096]),
)  # fmt: skip
def test_the_block_mask_is_the_dense_mask(shapes, one_context, hidden_size):
    """Token by token in its `mask_mod`, and block by block of 128 x 128 in what it lets be skipped."""
    groups = [
        PrefixGroup(
            [1] * (shapes[0][0] if one_context else c) + ([] if one_context else [i]), [[2] * n for n in r]
        )
        for i, (c, r) in enumerate(shapes)
    ]
    dense = pack(groups, hidden_size).attention_mask
    blocks = pack(groups, hidden_size, torch.device("cpu")).attention_mask
    rows, _, width, _ = dense.shape
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, width, width, "cpu"), dense)
    assert blocks.shape == dense.shape
    padding = -width % 128
    grid = F.pad(dense, (0, padding, 0, padding)).unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    assert torch.equal(blocks.to_dense().bool(), grid.any(-1).any(-2))


@settings(deadline=None)
@given(GROUPS)
def test_a_group_costs_what_it_says(shapes):
    for context, responses in shapes:
        group = PrefixGroup([1] * context, [[2] * n for n in responses])
        assert pack([group], 1).input_ids.numel() == group.tokens(shared=True)
        assert pack_plain([group]).input_ids.numel() == group.tokens(shared=False)


def test_a_context_of_all_trees_is_there_once_a_row():
    context = [1] * 20
    groups = [PrefixGroup(context, [[2] * 5]) for _ in range(8)]
    batch = pack(groups, 4096)
    assert batch.input_ids.numel() == len(batch.input_ids) * 20 + 8 * 5


def test_padding_of_safety_like_pairs():
    """Prompts of about 50 tokens, responses of about 125, both spread widely; two batch sizes."""
    rng = random.Random(0)

    def draw(mean):
        return max(1, round(rng.lognormvariate(0, 0.6) * mean))

    groups = [PrefixGroup([1] * draw(42), [[2] * draw(104), [2] * draw(104)]) for _ in range(512)]
    lengths = [group.tokens(shared=True) for group in groups]
    for budget in (4096, 16384):
        batches = length_sorted_batches(lengths, budget)
        cells = [pack([groups[i] for i in batch], 3584).input_ids.numel() for batch in batches]
        assert max(cells) <= budget
        assert sum(cells) <= 1.03 * sum(lengths)
