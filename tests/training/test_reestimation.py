"""Balance weights that follow the policy: against float64, over workers and stages, and after a kill."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bdpo.config import parse_config
from bdpo.data.pairs import prefix_groups, read_pairs
from bdpo.method.losses import Bdpo
from bdpo.method.mi import Reestimate
from bdpo.models.tokenizer import load_tokenizer
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.training.launcher import Launcher
from bdpo.training.reestimation import OnlineBalance
from tests.support.helpers import groups_in_lists, naive_logps
from tests.support.killed_training import same
from tests.support.training import PAIRS, copied, launch, score, weights

pytestmark = pytest.mark.long

TRAIN = {"num_train_epochs": 2, "save_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
MIX = {"every": 2, "source": "mix", "momentum": 0.25}

# The learning rate does not depend on the number of steps: a shorter training ends where a longer one was.
VARIANTS = {
    "one epoch": ({"num_train_epochs": 1}, None),
    "two steps": ({"max_steps": 2}, None),
    "epoch": ({}, {}),
    "mix": ({}, MIX),
    "stage 2": ({"zero_stage": 2}, {}),
    "lora": ({"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 1e-2}, {}),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


def variant(scored, folder, name, checkpoints=(), **train):
    changes, reestimate = VARIANTS[name]
    method = {"name": "bdpo", "reestimate": reestimate}
    return copied(scored, folder, checkpoints, train={**TRAIN, **changes, **train}, method=method)


@pytest.fixture(scope="module")
def runs(scored, tmp_path_factory):
    """Run folders of all variants, trained by two workers."""
    folder = tmp_path_factory.mktemp("runs")
    launch([variant(scored, folder / name, name) for name in VARIANTS], workers=2)
    return {name: RunDir(folder / name) for name in VARIANTS}


@pytest.fixture(scope="module")
def reference(scored):
    """The mutual information of the scores, (pairs, 2)."""
    scores = pq.read_table(Path(scored.run_dir) / "scores.parquet")
    columns = [torch.from_numpy(scores[name].to_numpy()) for name in ("mi_chosen", "mi_rejected")]
    return torch.stack(columns, dim=1).double()


def in_force(run, step):
    """What the checkpoint of a step has of the mutual information, by worker."""
    files = sorted((run.root / "checkpoints" / str(step) / "state").glob("*model_states.pt"))
    return [torch.load(file, weights_only=False)["mutual_information"].double() for file in files]


def naive_mi(run):
    """The same of the model in a run folder: one response at a time, in float64."""
    config = parse_config({**run_config(run), "run_dir": str(run.root)}, "test")
    model = AutoModelForCausalLM.from_pretrained(run.model)
    empty = load_tokenizer(config.model).unconditional_ids(config.score.unconditional)
    groups = groups_in_lists(prefix_groups(read_pairs(run.pairs, 0, PAIRS)))
    rows = [(prompt, response) for prompt, *responses in groups for response in responses]
    given, alone = (naive_logps(model, each) for each in (rows, [(empty, response) for _, response in rows]))
    return ((given - alone) / torch.tensor([len(response) for _, response in rows])).view(-1, 2)


def run_config(run):
    import yaml

    return yaml.safe_load((run.root / "config.yaml").read_text())


def rows(run):
    logged = MetricsLog(run.metrics).read()
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in logged]


def test_before_the_second_epoch_the_weights_are_those_of_the_policy(runs, reference):
    expected = naive_mi(runs["one epoch"])
    assert (expected - reference).abs().mean() > 0.01  # it has moved
    for mi in chain(in_force(runs["epoch"], 4), in_force(runs["epoch"], 6), in_force(runs["stage 2"], 4)):
        torch.testing.assert_close(mi, expected, rtol=1e-4, atol=1e-4)
    for mi in in_force(runs["epoch"], 3):  # the checkpoint of a step is written before the next one begins
        torch.testing.assert_close(mi, reference, rtol=0, atol=0)


def test_a_mixture_with_momentum(runs, reference):
    expected = 0.25 * reference + 0.75 * (naive_mi(runs["two steps"]) + reference) / 2
    for mi in in_force(runs["mix"], 3):
        torch.testing.assert_close(mi, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(in_force(runs["mix"], 5)[0], expected)


def test_the_loss_is_that_of_the_new_weights(runs, scored, reference):
    """The mean of the weights over the pairs of the second epoch, by the formula of the method."""
    mi = in_force(runs["epoch"], 4)[0]
    expected = Bdpo().weights(*mi.unbind(1))[0].mean()
    before = Bdpo().weights(*reference.unbind(1))[0].mean()
    sizes = [8, 8, 6]
    first, second = (
        sum(row["balance/weight_chosen"] * size for row, size in zip(epoch, sizes, strict=True)) / PAIRS
        for epoch in (rows(runs["epoch"])[:3], rows(runs["epoch"])[3:])
    )
    assert first == pytest.approx(float(before), abs=1e-5)
    assert second == pytest.approx(float(expected), abs=1e-5)
    assert abs(first - second) > 1e-3


def test_what_is_in_force_is_logged(runs, reference):
    logged = rows(runs["epoch"])
    assert [row["balance/drift"] for row in logged[:3]] == [0.0] * 3
    assert logged[0]["balance/mi_chosen"] == pytest.approx(float(reference[:, 0].mean()))
    mi = in_force(runs["epoch"], 4)[0]
    for row in logged[3:]:
        assert row["balance/mi_chosen"] == pytest.approx(float(mi[:, 0].mean()))
        assert row["balance/mi_rejected"] == pytest.approx(float(mi[:, 1].mean()))
        assert row["balance/drift"] == pytest.approx(float((mi - reference).abs().mean()))
    assert "balance/drift" not in rows(runs["one epoch"])[0]


def test_dropout_takes_no_part(runs):
    """Of an adapter that is still zero: two estimates of the same weights would differ otherwise."""
    states = in_force(runs["lora"], 4)
    assert same(states[0], states[-1])
    assert states[0].isfinite().all()


@pytest.fixture(scope="module")
def resumed(scored, runs, tmp_path_factory):
    """Trainings that were killed within an epoch, at its end, and after the weights were made anew."""
    folder = tmp_path_factory.mktemp("resumed")
    killed = [("epoch", 2), ("epoch", 3), ("epoch", 5), ("mix", 3), ("mix", 4), ("lora", 4)]
    configs = {}
    for name, step in killed:
        run = folder / f"{name} {step}"
        configs[name, step] = variant(scored, run, name, [runs[name].root / "checkpoints" / str(step)])
        shutil.copy(runs[name].metrics, run)
    launch(list(configs.values()), workers=2)
    return {key: RunDir(config.run_dir) for key, config in configs.items()}


@pytest.mark.parametrize(
    ("name", "step"), [("epoch", 2), ("epoch", 3), ("epoch", 5), ("mix", 3), ("mix", 4), ("lora", 4)]
)
def test_a_resumed_training_ends_exactly_as_the_undisturbed_one(runs, resumed, name, step):
    run = resumed[name, step]
    assert same(weights(run), weights(runs[name]))
    assert rows(run) == rows(runs[name])
    assert same(in_force(run, 6), in_force(runs[name], 6))


def test_one_worker_trains_as_two_from_the_start_and_from_their_checkpoint(scored, runs, tmp_path):
    configs = [variant(scored, tmp_path / "alone", "epoch")]
    configs += [variant(scored, tmp_path / "less", "epoch", [runs["epoch"].root / "checkpoints" / "4"])]
    shutil.copy(runs["epoch"].metrics, tmp_path / "less")
    launch(configs)
    for config in configs:
        ours, theirs = weights(RunDir(config.run_dir)), weights(runs["epoch"])
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


@given(
    every=st.one_of(st.just("epoch"), st.integers(1, 12)),
    of_epoch=st.integers(1, 6),
    epochs=st.integers(1, 4),
    part=st.floats(0, 1),
)
def test_steps_are_made_once_and_in_order_wherever_a_training_begins(every, of_epoch, epochs, part):
    total = of_epoch * epochs
    first, made, estimated = round(part * total), [], []
    plan = SimpleNamespace(total_steps=total, steps_per_epoch=of_epoch)
    config = SimpleNamespace(method=Bdpo(reestimate=Reestimate(every=every)))
    pairs = SimpleNamespace(config=config, mi=torch.zeros(1, 2), step=lambda plan, number: number)
    pairs.weighed_by = lambda mi: pairs
    balance = OnlineBalance(None, pairs, plan, Launcher(list, lambda *_: None))
    balance._estimate = lambda: estimated.append(first + len(made))
    for step in balance.steps(first):
        made.append(step)
    apart = of_epoch if every == "epoch" else every
    assert made == list(range(first, total))
    assert estimated == [step for step in range(max(first, 1), total) if step % apart == 0]
