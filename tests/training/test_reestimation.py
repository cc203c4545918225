"""Balance weights that follow the policy: against float64, over workers and stages, and after a kill."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bdpo.config import parse_config
from bdpo.data.pairs import prefix_groups, read_pairs
from bdpo.errors import UserError
from bdpo.method.losses import Bdpo
from bdpo.method.mi import Reestimate
from bdpo.models.tokenizer import load_tokenizer
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import plan_without_lengths
from bdpo.training.launcher import Launcher
from bdpo.training.reestimation import OnlineBalance, estimation_steps
from bdpo.training.rungs import Rungs
from tests.support.helpers import groups_in_lists, naive_logps
from tests.support.killed_training import same
from tests.support.training import PAIRS, copied, errors, launch, score, weights

pytestmark = pytest.mark.long

TRAIN = {"num_train_epochs": 2, "save_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
MIX = {"every": 2, "source": "mix", "momentum": 0.25}

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 1e-2}

# The learning rate does not depend on the number of steps: a shorter training ends where a longer one was.
VARIANTS = {
    "one epoch": ({"num_train_epochs": 1}, None),
    "two steps": ({"max_steps": 2}, None),
    "epoch": ({}, {}),
    "mix": ({}, MIX),
    "stage 2": ({"zero_stage": 2}, {}),
    "stage 0": ({"zero_stage": 0}, {}),
    "lora": (LORA, {}),
    "lora, one epoch": (LORA | {"num_train_epochs": 1}, None),
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
    return [torch.load(file, weights_only=False)["balance"]["mi"].double() for file in files]


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
    """The estimate is that of the merged model, which has none."""
    for mi in in_force(runs["lora"], 4):
        torch.testing.assert_close(mi, naive_mi(runs["lora, one epoch"]), rtol=1e-4, atol=1e-4)


def test_the_rows_of_a_model_that_takes_no_shared_ones(make_chat, tiny_chat, tmp_path):
    bloom = score(tmp_path, tiny_chat, architecture="bloom")
    configs = [variant(bloom, tmp_path / name, name) for name in ("one epoch", "epoch")]
    launch(configs)
    expected = naive_mi(RunDir(configs[0].run_dir))
    torch.testing.assert_close(*in_force(RunDir(configs[1].run_dir), 4), expected, rtol=1e-4, atol=1e-4)


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


STAGES = "epoch", "stage 2", "stage 0"


@pytest.fixture(scope="module")
def alone(scored, runs, tmp_path_factory):
    """One worker's trainings: from the start, from checkpoints of two workers, from one of other pairs."""
    folder = tmp_path_factory.mktemp("alone")
    configs = [variant(scored, folder / "start", "epoch")]
    for name in STAGES:
        checkpoint = runs[name].root / "checkpoints" / "4"
        configs += [variant(scored, folder / name, name, [checkpoint])]
        shutil.copy(runs[name].metrics, folder / name)
    configs += [variant(scored, folder / "other", "stage 0", [runs["stage 0"].root / "checkpoints" / "4"])]
    scores = pq.read_table(folder / "other" / "scores.parquet")
    pq.write_table(scores.take([1, 0, *range(2, PAIRS)]), folder / "other" / "scores.parquet")
    launch(configs, may_stop=True)
    return folder


@pytest.mark.parametrize("name", ["start", *STAGES])
def test_one_worker_trains_as_two_from_the_start_and_from_their_checkpoint(runs, alone, name):
    run = RunDir(alone / name)
    ours, theirs = weights(run), weights(runs["epoch"])
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-4)
    torch.testing.assert_close(in_force(run, 6)[0], in_force(runs["epoch"], 6)[0], rtol=0, atol=1e-4)


def test_weights_of_other_pairs_are_refused(alone):
    [said] = errors(alone / "other")
    assert said.startswith("the checkpoint has balance weights of other pairs than those that are trained on")


def test_a_trial_that_stands_at_a_rung_estimates_only_if_it_goes_on(scored, tmp_path):
    """The rung is after the third step, before which the second epoch's weights would be made."""
    config = variant(scored, tmp_path / "run", "epoch")
    Rungs(tmp_path / "run" / "rungs", (3,)).stop()
    (tmp_path / "run" / "fault.py").write_text("training.OnlineBalance._estimate = None\n")
    launch([config], rungs=[3])
    assert [row["step"] for row in rows(RunDir(config.run_dir))] == [1, 2, 3]


@pytest.mark.parametrize("equal", [{"balance": "none"}, {"sharpness": 0.0}, {"min_share": 0.5}])
def test_equal_weights_are_not_estimated_again(equal):
    with pytest.raises(ValueError, match="reestimate: the weights are equal whatever"):
        Bdpo(reestimate=Reestimate(), **equal)


def test_an_estimation_that_never_comes_is_refused(scored):
    values = scored.model_dump() | {"method": {"name": "bdpo", "reestimate": {}}}
    with pytest.raises(UserError, match=r"method\.reestimate\.every=epoch requires train\.num_train_epochs"):
        parse_config(values, "test")
    values["method"]["reestimate"] = {"every": 3}
    config = parse_config(values, "test")
    said = r"every=3: the mutual information is never estimated again in the 3 steps .*\(3 an epoch\)"
    with pytest.raises(UserError, match=said):
        estimation_steps(config, plan_without_lengths(PAIRS, config.train, 0))


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
    pairs: Any = SimpleNamespace(config=config, mi=torch.zeros(1, 2), step=lambda plan, number: number)
    pairs.weighed_by = lambda mi: pairs
    balance = OnlineBalance(None, pairs, plan, Launcher(list, lambda *_: None))
    balance._estimate = lambda: estimated.append(first + len(made))
    apart = of_epoch if every == "epoch" else every
    if apart >= total:
        with pytest.raises(UserError, match="never estimated again"):
            next(balance.steps(first))
        return
    for step in balance.steps(first):
        made.append(step)
    assert made == list(range(first, total))
    assert estimated == [step for step in range(max(first, 1), total) if step % apart == 0]
