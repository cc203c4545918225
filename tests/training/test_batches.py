from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo.config import TrainConfig
from bdpo.errors import UserError
from bdpo.training.batches import TrainingPlan, deal_micro_batches, draw_held_out

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=50)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_uses_every_pair_once(lengths, batch_size, seed):
    plan = TrainingPlan(lengths, TrainConfig(global_batch_size=batch_size, num_train_epochs=2), seed)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(i for step in steps for i in plan.global_batch(step)) == list(range(len(lengths)))
    assert plan.total_steps == 2 * plan.steps_per_epoch


@given(LENGTHS, st.integers(1, 20), st.integers(1, 4), st.integers(10, 200))
@settings(deadline=None)
def test_workers_share_a_global_batch_in_equally_many_micro_steps(lengths, batch_size, workers, budget):
    train = TrainConfig(global_batch_size=batch_size, tokens_per_micro_batch=budget)
    plan = TrainingPlan(lengths, train, 0)
    dealt = plan.micro_batches(0, workers)
    assert len(dealt) == workers
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(i for batches in dealt for batch in batches for i in batch) == sorted(plan.global_batch(0))
    for batch in (batch for batches in dealt for batch in batches):
        assert len(batch) <= 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    # Those that wait for each other cost about the same: all that cost more or less are of other micro-steps.
    costs = [sum(lengths[i] for i in batches[number]) for number in range(len(dealt[0])) for batches in dealt]
    assert costs == sorted(costs, reverse=True)


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


def test_a_warmup_that_takes_all_steps_is_refused():
    with pytest.raises(UserError, match=r"the warmup takes all 3 steps; lower it, or raise train.max_steps"):
        TrainingPlan([1] * 64, TrainConfig(max_steps=3, warmup_ratio=0.9), 0)
    assert TrainingPlan([1] * 64, TrainConfig(max_steps=3, warmup_ratio=0.7), 0).warmup_steps == 2
    assert TrainingPlan([1], TrainConfig(), 0).warmup_steps == 0


def test_a_batch_is_split_in_halves_when_workers_lack_one():
    """Workers of one micro-step wait for each other: 7 pairs against 1 would be slow."""
    (one,), (other,) = deal_micro_batches(range(8), [10] * 8, budget=100, workers=2)
    assert (len(one), len(other)) == (4, 4)
