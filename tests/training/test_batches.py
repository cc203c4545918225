from __future__ import annotations

import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo.config import TrainConfig
from bdpo.errors import UserError
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout
from bdpo.training.batches import (
    CLOSE_TO_MEAN,
    TrainingPlan,
    _costliest_to_the_emptiest,
    _exchange,
    deal_micro_batches,
    draw_held_out,
    plan_without_lengths,
)

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=50)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_uses_every_pair_once(lengths, batch_size, seed):
    plan = TrainingPlan(lengths, TrainConfig(global_batch_size=batch_size, num_train_epochs=2), seed)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(i for step in steps for i in plan.global_batch(step)) == list(range(len(lengths)))
    assert plan.total_steps == 2 * plan.steps_per_epoch


PAIRS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=50
)

LAYOUTS = st.builds(RowLayout, st.sampled_from([2, 64, 4096]), st.booleans(), st.sampled_from([1, 2]))


def grid_of(batch, pairs, layout):
    """Tokens of the grid that the model would be given."""
    last = 1 + layout.responses
    groups = PrefixGroups.of([[i + 2] * pairs[i][0], *([1] * n for n in pairs[i][1:last])] for i in batch)
    return layout.pack(groups).input_ids.numel()


@given(PAIRS, st.integers(1, 20), st.integers(1, 4), st.integers(10, 400), LAYOUTS)
@settings(deadline=None)
def test_workers_share_a_global_batch_in_equally_many_micro_steps(pairs, size, workers, budget, layout):
    train = TrainConfig(global_batch_size=size, tokens_per_micro_batch=budget)
    lengths = layout.tokens(np.array(pairs)[:, : 1 + layout.responses]).tolist()
    plan = TrainingPlan(lengths, train, 0)
    dealt = plan.micro_batches(0, workers, layout)
    assert dealt == plan.micro_batches(0, workers, layout)
    assert len(dealt) == workers
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(i for batches in dealt for batch in batches for i in batch) == sorted(plan.global_batch(0))
    for batch in (batch for batches in dealt for batch in batches):
        assert len(batch) <= 1 or grid_of(batch, pairs, layout) <= budget


@given(st.lists(st.integers(2, 200), min_size=2, max_size=24), st.integers(2, 5))
@settings(deadline=None)
def test_no_exchange_would_make_the_costliest_worker_cheaper(lengths, workers):
    """Neither of two pairs for each other, nor of one pair for nothing, unless it is close to the mean."""
    layout = RowLayout(4096, shared=True)
    costs = [round(layout.cost([length])) for length in lengths]
    dealt = deal_micro_batches(range(len(lengths)), lengths, 10**6, workers, layout)
    full, *others = sorted((batch for (batch,) in dealt), key=lambda batch: -sum(costs[i] for i in batch))
    load = sum(costs[i] for i in full)
    if load > CLOSE_TO_MEAN * sum(costs) / workers:
        for other in others:
            gains = [costs[given] - taken for given in full for taken in [0, *(costs[i] for i in other)]]
            assert not [gain for gain in gains if 0 < gain < load - sum(costs[i] for i in other)]


def one_exchange_after_another(parts, costs):
    """`_exchange` as a double loop over all exchanges, in whole numbers."""
    loads = [sum(costs[i] for i in part) for part in parts]
    while max(loads) > CLOSE_TO_MEAN * sum(loads) / len(loads):
        full = loads.index(max(loads))
        found = [
            (max(loads[full] - moved, loads[other] + moved), other, given, taken, moved)
            for other in range(len(parts))
            for given in parts[full]
            for taken in [*parts[other], -1]
            if 0 < (moved := costs[given] - (costs[taken] if taken >= 0 else 0)) < loads[full] - loads[other]
        ]
        if not found:
            break
        _, other, given, taken, moved = min(found)
        parts[full].remove(given)
        parts[other].append(given)
        if taken >= 0:
            parts[other].remove(taken)
            parts[full].append(taken)
        loads[full] -= moved
        loads[other] += moved
    return parts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 6))
@settings(deadline=None)
def test_each_exchange_is_the_best_one_and_of_equal_ones_the_first(costs, count):
    dealt = _costliest_to_the_emptiest(costs, count)
    expected = one_exchange_after_another([list(part) for part in dealt], costs)
    assert _exchange(dealt, costs) == expected


def fewest(costs, lengths, parts, budget):
    """Cost of the costliest of so many contiguous parts, the least of all ways; None if no way fits."""
    if not lengths:
        return 0
    if not parts:
        return None
    tried = [
        max(size * costs[0], rest)
        for size in range(1, len(lengths) + 1)
        if size == 1 or size * lengths[0] <= budget
        if (rest := fewest(costs[size:], lengths[size:], parts - 1, budget)) is not None
    ]
    return min(tried, default=None)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=8), st.integers(1, 3), st.integers(10, 200))
@settings(deadline=None)
def test_plain_rows_are_cut_where_the_costliest_part_is_cheapest(lengths, workers, budget):
    layout = RowLayout(8, shared=False)
    dealt = deal_micro_batches(range(len(lengths)), lengths, budget, workers, layout)
    ordered = sorted(lengths, reverse=True)
    costs = [round(layout.cost([length])) for length in ordered]
    parts = [[lengths[i] for i in batch] for batches in dealt for batch in batches]
    found = max(len(part) * round(layout.cost([max(part)])) for part in parts if part)
    assert found == fewest(costs, ordered, len(parts), budget)
    assert len(parts) == workers or fewest(costs, ordered, len(parts) - workers, budget) is None


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, step):
        return TrainingPlan([1] * 40, TrainConfig(global_batch_size=40), seed).global_batch(step)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_max_steps_goes_on_into_further_epochs():
    plan = TrainingPlan([1] * 4, TrainConfig(global_batch_size=2, max_steps=5), 0)
    assert plan.total_steps == 5
    assert sorted(plan.global_batch(2) + plan.global_batch(3)) == [0, 1, 2, 3]


@given(st.sets(st.text(max_size=4), min_size=2, max_size=40), st.floats(0, 0.5), st.integers(0, 3))
@settings(deadline=None)
def test_which_pairs_are_held_out_does_not_depend_on_the_order_of_rows(ids, fraction, seed):
    ordered, shuffled = sorted(ids), random.Random(seed).sample(sorted(ids), len(ids))
    if math.ceil(fraction * len(ids)) == len(ids):
        return
    out = {ordered[row] for row in draw_held_out(ordered, fraction, seed)}
    assert len(out) == math.ceil(fraction * len(ids))
    assert out == {shuffled[row] for row in draw_held_out(shuffled, fraction, seed)}


def test_held_out_pairs_depend_on_the_seed_and_leave_some_to_train_on():
    ids = [str(i) for i in range(100)]
    assert draw_held_out(ids, 0.1, 0) != draw_held_out(ids, 0.1, 1)
    with pytest.raises(UserError, match=r"train.eval_fraction=0.9: holds out all 3 pairs"):
        draw_held_out(ids[:3], 0.9, 0)


def test_the_plan_without_lengths_has_the_steps_of_the_plan_with_them():
    train = TrainConfig(global_batch_size=8, eval_fraction=0.15)
    ids = [str(i) for i in range(90)]
    kept = len(ids) - len(draw_held_out(ids, train.eval_fraction, 3))
    found = plan_without_lengths(len(ids), train, 3)
    assert len(found.lengths) == kept
    assert found.total_steps == TrainingPlan([1] * kept, train, 3).total_steps
    with pytest.raises(UserError, match=r"train.eval_fraction=0.9: holds out all 3 pairs"):
        plan_without_lengths(3, TrainConfig(eval_fraction=0.9), 0)


def test_a_plan_of_millions_of_pairs_takes_no_object_a_pair():
    """As Python objects the lengths and the order of 30 M pairs were 3 GB on every worker."""
    count, train = 300_000, TrainConfig(global_batch_size=64)
    lengths = np.full(count, 300)
    tracemalloc.start()
    plan = TrainingPlan(lengths, train, 0)
    plan.micro_batches(0, 8, RowLayout(64, shared=True))
    plan_without_lengths(count, train, 0)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 12 * count


def test_a_warmup_that_takes_all_steps_is_refused():
    with pytest.raises(UserError, match=r"the warmup takes all 3 steps; lower it, or raise train.max_steps"):
        TrainingPlan([1] * 64, TrainConfig(max_steps=3, warmup_ratio=0.9), 0)
    assert TrainingPlan([1] * 64, TrainConfig(max_steps=3, warmup_ratio=0.7), 0).warmup_steps == 2
    assert TrainingPlan([1], TrainConfig(), 0).warmup_steps == 0


@pytest.mark.parametrize("shared", [True, False])
def test_equal_pairs_are_dealt_in_equal_numbers(shared):
    """Workers of one micro-step wait for each other: 7 pairs against 1 would be slow."""
    (one,), (other,) = deal_micro_batches(range(8), [10] * 8, 100, 2, RowLayout(64, shared))
    assert (len(one), len(other)) == (4, 4)


def test_a_long_pair_stands_against_several_short_ones():
    lengths = [100, 50, 50, 30, 30, 40]
    dealt = deal_micro_batches(range(6), lengths, 1000, 3, RowLayout(4096, shared=True))
    assert sorted(sum(lengths[i] for i in batch) for (batch,) in dealt) == [100, 100, 100]


def test_workers_take_turns_at_the_costliest_part():
    """Else the first worker would have the costlier part in every micro-step, and the others would wait."""
    parts = deal_micro_batches(range(4), [40, 30, 20, 10], 40, 2, RowLayout(64, shared=True))
    assert parts == [[[0], [3]], [[1], [2]]]


def test_parts_that_do_not_fit_the_budget_are_made_one_more_for_each_worker():
    """The tokens would fill two parts, but two of the pairs do not fit one."""
    for workers, micro_steps in ((1, 3), (2, 2)):
        dealt = deal_micro_batches(range(3), [60, 60, 60], 100, workers, RowLayout(4096, shared=True))
        assert [len(batches) for batches in dealt] == [micro_steps] * workers
        assert max(len(batch) for batches in dealt for batch in batches) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_pair_longer_than_the_budget_is_one_micro_step(shared):
    """Not as many as its tokens would fill: the others would be forwards for nothing."""
    lengths = [1000, 30, 30, 30]
    (batches,) = deal_micro_batches(range(4), lengths, 100, 1, RowLayout(4096, shared))
    assert sorted(map(sorted, batches)) == [[0], [1, 2, 3]]
