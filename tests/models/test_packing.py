"""Rows and masks without any model: who sees whom, at which position, and how much padding that costs."""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from bdpo.models.arrangement import arrange, length_sorted_batches
from bdpo.models.packing import Batch, PrefixGroups
from bdpo.models.row_layout import RowLayout
from tests.support.helpers import groups_in_lists


def shapes(longest_context, longest_response, most_groups):
    """[(context, [response, ...]), ...] in tokens; each group has as many responses."""

    def of(responses):
        lengths = st.lists(st.integers(1, longest_response), min_size=responses, max_size=responses)
        group = st.tuples(st.integers(1, longest_context), lengths)
        return st.lists(group, min_size=1, max_size=most_groups)

    return st.integers(1, 3).flatmap(of)


GROUPS = shapes(9, 12, 8)

LAYOUTS = st.builds(RowLayout, st.sampled_from([2, 30, 4096]), st.booleans())


def lists_of(shapes, one_context=False):
    """[context, *responses] of each group; all ids differ, so that they say where a token came from."""
    ids = iter(range(10**6))
    common = [next(ids) for _ in range(shapes[0][0])]
    return [
        [common if one_context else [next(ids) for _ in range(context)]]
        + [[next(ids) for _ in range(n)] for n in responses]
        for context, responses in shapes
    ]


def cell_by_cell(groups, layout):
    """What a layout makes of groups, in Python lists: a cell is (token, position, group, response)."""
    common = []
    if not layout.shared:
        groups = [[context, response] for context, *responses in groups for response in responses]
        rows = [[number] for number in range(len(groups))]
    else:
        common = groups[0][0] if all(group[0] == groups[0][0] for group in groups) else []
        sizes = [sum(map(len, group)) - len(common) for group in groups]
        rows = arrange(sizes, len(common), layout.hidden_size)
    lines, predicted = [], {}
    for row, members in enumerate(rows):
        line = [(token, position, 0, 0) for position, token in enumerate(common)]
        for number in members:
            context, *responses = groups[number]
            group = 0 if common else number
            if not common:
                line += [(token, position, group, 0) for position, token in enumerate(context)]
            last = (len(common) or len(line)) - 1
            for which, response in enumerate(responses):
                begin = len(line)
                line += [(t, position, group, begin) for position, t in enumerate(response, len(context))]
                columns = [last, *range(begin, len(line) - 1)]
                predicted[number, which] = [(row, column) for column in columns], response
        lines.append(line)
    width = max(map(len, lines))
    grid = [line + [(0, 0, 0, 0)] * (width - len(line)) for line in lines]
    targets = [
        (row * width + column, token, response)
        for response, key in enumerate(sorted(predicted))
        for (row, column), token in zip(*predicted[key], strict=True)
    ]
    ids, positions, _, _ = torch.tensor(grid).unbind(2)
    if not layout.shared:
        positions = None
        mask = torch.tensor([[column < len(line) for column in range(width)] for line in lines])
    else:
        mask = torch.tensor(
            [[[[sees(row, q, k) for k in range(width)] for q in range(width)]] for row in grid]
        )
    return Batch(ids, positions, mask, *torch.tensor(targets).unbind(1))


def sees(row, query, key):
    same_group, same_response = row[query][2] == row[key][2], row[query][3] == row[key][3]
    return key <= query and same_group and (same_response or row[key][3] == 0)


@settings(deadline=None)
@given(GROUPS, st.booleans(), LAYOUTS)
def test_a_batch_is_what_lists_of_cells_make_of_it(shapes, one_context, layout):
    """Every field, element by element, with its type."""
    groups = lists_of(shapes, one_context)
    packed, expected = layout.pack(PrefixGroups.of(groups)), cell_by_cell(groups, layout)
    for field in (field.name for field in fields(Batch)):
        ours, theirs = getattr(packed, field), getattr(expected, field)
        if field == "attention_mask" and layout.shared:
            ours = ours.dense()
        assert (ours is None and theirs is None) or ours.dtype == theirs.dtype
        assert ours is None or torch.equal(ours, theirs)


@given(GROUPS, st.data())
def test_some_of_the_groups_are_those_groups(shapes, data):
    groups = lists_of(shapes)
    some = data.draw(st.lists(st.sampled_from(range(len(groups))), min_size=1))
    assert groups_in_lists(PrefixGroups.of(groups)[some]) == [groups[i] for i in some]
    responses = [response for _, *responses in groups for response in responses]
    assert groups_in_lists(PrefixGroups.of(groups).behind([7, 8])) == [[[7, 8], r] for r in responses]
    assert PrefixGroups.of(groups)[some].tokens_in_order().tolist() == [
        token for i in some for part in groups[i] for token in part
    ]
    apart = [[context, response] for context, *responses in groups for response in responses]
    assert groups_in_lists(PrefixGroups.of(groups).apart()) == apart


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


def operations(lengths, common, rows, hidden_size):
    width = common + max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * width * (1 + width / (6 * hidden_size))


def longest_to_the_shortest(lengths, count):
    rows = [[] for _ in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        min(rows, key=lambda row: sum(lengths[i] for i in row)).append(index)
    return rows


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 30), st.integers(1, 5000))
def test_no_other_number_of_rows_costs_less(lengths, common, hidden_size):
    """From one to sixteen groups a row, each way in full: of equal ones that of the fewest rows."""
    counts = sorted({-(-len(lengths) // in_a_row) for in_a_row in range(1, min(16, len(lengths)) + 1)})
    ways = [longest_to_the_shortest(lengths, count) for count in counts]
    best = min(ways, key=lambda rows: operations(lengths, common, rows, hidden_size))
    assert arrange(lengths, common, hidden_size) == best


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


@settings(deadline=None)
@given(GROUPS, st.booleans(), LAYOUTS)
def test_every_response_token_is_predicted_from_its_context_and_what_precedes_it_alone(
    shapes, one_context, layout
):
    """Walk from each predictor through the mask: what it sees, by position, is a prefix of [c | y]."""
    groups = lists_of(shapes, one_context)
    rows = [(context, response) for context, *responses in groups for response in responses]
    batch = layout.pack(PrefixGroups.of(groups))
    width = batch.input_ids.shape[1]
    if layout.shared:
        positions, mask = batch.position_ids, batch.attention_mask.dense()
    else:  # what a model makes of plain rows by itself
        positions = torch.arange(width).expand_as(batch.input_ids)
        mask = torch.ones(width, width, dtype=torch.bool).tril() & batch.attention_mask[:, None, None]
    token = iter(range(len(batch.targets)))
    for number, (context, response) in enumerate(rows):
        for k in range(len(response)):
            n = next(token)
            row, column = divmod(batch.logit_positions[n].item(), width)
            seen = mask[row, 0, column]
            order = positions[row][seen].argsort()
            assert batch.input_ids[row][seen][order].tolist() == [*context, *response][: len(context) + k]
            assert positions[row][seen][order].tolist() == list(range(len(context) + k))
            assert batch.input_ids[row, column] == [*context, *response][len(context) + k - 1]
            assert batch.targets[n] == response[k]
            assert batch.responses[n] == number
    assert mask.any(-1).all()  # a softmax over nothing is not a number


@settings(deadline=None, max_examples=10)
@given(shapes(150, 200, 4), st.booleans(), st.sampled_from([2, 4096]))
def test_the_block_mask_is_the_dense_mask(shapes, one_context, hidden_size):
    """Token by token in its `mask_mod`, and block by block of 128 x 128 in what it lets be skipped."""
    groups = PrefixGroups.of(lists_of(shapes, one_context))
    mask = RowLayout(hidden_size, shared=True).pack(groups).attention_mask
    dense, blocks = mask.dense(), mask.blocks()
    rows, _, width, _ = dense.shape
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, width, width, "cpu"), dense)
    assert blocks.shape == dense.shape
    padding = -width % 128
    grid = F.pad(dense, (0, padding, 0, padding)).unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    assert torch.equal(blocks.to_dense().bool(), grid.any(-1).any(-2))


@settings(deadline=None)
@given(GROUPS, st.booleans())
def test_a_group_takes_the_tokens_that_are_planned_for_it(shapes, shared):
    layout, groups = RowLayout(1, shared), PrefixGroups.of(lists_of(shapes))
    packed = [layout.pack(groups[[index]]).input_ids.numel() for index in range(len(groups))]
    assert packed == layout.tokens(groups.lengths).tolist()


def test_a_context_of_all_groups_is_there_once_a_row():
    groups = PrefixGroups.of([[1] * 20, [2] * 5] for _ in range(8))
    input_ids = RowLayout(4096, shared=True).pack(groups).input_ids
    assert input_ids.numel() == len(input_ids) * 20 + 8 * 5


def test_padding_of_safety_like_pairs():
    """Prompts of about 50 tokens, responses of about 125, both spread widely; two batch sizes."""
    rng = random.Random(0)

    def draw(mean):
        return max(1, round(rng.lognormvariate(0, 0.6) * mean))

    lengths = np.array([[draw(42), draw(104), draw(104)] for _ in range(512)])
    groups = PrefixGroups.in_a_row(np.ones(lengths.sum(), np.int32), lengths)
    groups.tokens[groups.starts[:, 0]] = range(512)  # no two have their context in common
    layout = RowLayout(3584, shared=True)
    tokens = layout.tokens(lengths).tolist()
    for budget in (4096, 16384):
        cells = [
            layout.pack(groups[batch]).input_ids.numel() for batch in length_sorted_batches(tokens, budget)
        ]
        assert max(cells) <= budget
        assert sum(cells) <= 1.03 * sum(tokens)
