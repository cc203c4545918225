"""Training for real: DeepSpeed ZeRO-3 in one and two gloo processes, on CPU."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bdpo.errors import UserError
from bdpo.method.base import LossOutput, PairLogps
from bdpo.models.logps import ROUNDING
from bdpo.scoring.scores import SCORE_SCHEMA
from bdpo.storage.checksums import CHECKSUMS
from bdpo.storage.run_dir import RunDir
from bdpo.training.loop import _accumulate, _require_reference, best_first
from tests.support.helpers import save_model, tiny_config
from tests.support.training import copied, errors, launch, metrics, score, trained, weights

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_chat):
    """A run folder with prepared and scored pairs, to be copied by each training."""
    return score(tmp_path_factory.mktemp("scored"), tiny_chat)


@pytest.fixture(scope="module")
def uninterrupted(scored, tmp_path_factory):
    """Plain DPO by one worker."""
    return trained(scored, tmp_path_factory.mktemp("one") / "run", method={"name": "dpo"})


def test_the_export_loads_and_differs_from_the_base(scored, uninterrupted):
    base = AutoModelForCausalLM.from_pretrained(scored.model.name_or_path).state_dict()
    exported = weights(uninterrupted)
    assert base.keys() == exported.keys()
    assert all((base[name] != exported[name]).any() for name in base)
    assert AutoTokenizer.from_pretrained(uninterrupted.model).chat_template
    assert (uninterrupted.model / CHECKSUMS).is_file()


def test_sums_of_metrics_hold_no_graph():
    """Else the activations of every micro-batch would live until the step ends."""
    loss = torch.ones(3, requires_grad=True) * 2
    sums = {}
    for counts in (True, False, True):
        _accumulate(sums, LossOutput(loss, {"rewards/chosen": torch.full((3,), 4.0)}), counts)
    assert {name: value.item() for name, value in sums.items()} == {"loss": 12, "rewards/chosen": 24}
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize(("greatest", "expected"), [(False, [2, 4, 3, 1]), (True, [3, 1, 4, 2])])
def test_of_equal_checkpoints_the_newest_is_the_best(tmp_path, greatest, expected):
    keys = {
        "eval_fraction": 0.1,
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": greatest,
    }
    train = tiny_config(tmp_path, tmp_path, tmp_path, train=keys).train
    losses = {1: 0.3, 2: 0.1, 3: 0.3, 4: 0.2}
    reported = [
        SimpleNamespace(checkpoint=step, metrics={"step": step, train.best_metric: loss})
        for step, loss in losses.items()
    ]
    assert best_first(train, reported) == expected


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(("share", "is_refused"), [(0.9, False), (-0.9, False), (1.1, True), (-1.1, True)])
def test_policy_and_reference_may_differ_by_rounding_alone(tmp_path, side, share, is_refused):
    """By so many nats per root token of a response of 100 tokens."""
    config, zeros = tiny_config(tmp_path, tmp_path, tmp_path), torch.zeros(2)
    pairs = PairLogps(*[zeros] * len(fields(PairLogps)))
    pairs = replace(pairs, chosen_tokens=zeros + 100, rejected_tokens=zeros + 100)
    apart = torch.tensor([0.0, 10 * share * ROUNDING["float32"]])
    refused = pytest.raises(UserError, match="policy and reference differ") if is_refused else nullcontext()
    with refused:
        _require_reference(replace(pairs, **{f"policy_{side}": apart}), config)


def test_metrics_are_those_of_the_design(uninterrupted):
    (first, *_, last) = [json.loads(line) for line in uninterrupted.metrics.read_text().splitlines()]
    assert last.keys() >= {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected", "grad_norm", "learning_rate", "epoch", "balance/weight_chosen",
        "balance/weight_rejected", "balance/margins", "num_tokens", "tokens_per_second",
    }  # fmt: skip
    assert last["step"] == 3
    assert last["epoch"] == 1
    assert first["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
    scores = pq.read_table(uninterrupted.root / "scores.parquet", schema=SCORE_SCHEMA)
    parts = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    assert last["num_tokens"] == sum(sum(scores[part].to_pylist()) for part in parts)


def test_balance_none_with_alpha_2_is_dpo_step_by_step(scored, uninterrupted, tmp_path):
    run = trained(scored, tmp_path / "run", method={"name": "bdpo", "balance": "none", "alpha": 2})
    assert metrics(run) == pytest.approx(metrics(uninterrupted), abs=1e-6)
    bdpo = trained(scored, tmp_path / "bdpo", method={"name": "bdpo"})
    assert metrics(bdpo)[1:] != pytest.approx(metrics(uninterrupted)[1:], abs=1e-4)


def test_two_workers_train_as_one(scored, uninterrupted, tmp_path):
    run = trained(scored, tmp_path / "run", workers=2, method={"name": "dpo"})
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert metrics(run, name) == pytest.approx(metrics(uninterrupted, name), rel=1e-5, abs=1e-6), name
    for name, value in weights(uninterrupted).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-4, atol=1e-5)


# torch.empty is NaN then, and with it the padding of every partition; 2 divides the sizes, 3 does not.
UNINITIALISED = "torch.use_deterministic_algorithms(True, warn_only=True)"


def test_three_workers_train_as_one_whatever_lies_in_the_padding_of_their_partitions(
    scored, uninterrupted, tmp_path
):
    config = copied(scored, tmp_path / "run", method={"name": "dpo"})
    (tmp_path / "run" / "fault.py").write_text(UNINITIALISED)
    launch([config], workers=3)
    run = RunDir(config.run_dir)
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert metrics(run, name) == pytest.approx(metrics(uninterrupted, name), rel=1e-5, abs=1e-6), name


def test_a_weight_that_is_no_number_is_found_in_the_last_partition(scored, tmp_path):
    shutil.copytree(scored.model.name_or_path, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][-1] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = copied(scored, tmp_path / "run", model={"name_or_path": str(tmp_path / "model")})
    launch([config], workers=3, may_stop=True)
    found = errors(tmp_path / "run")
    assert len(found) == 3
    assert all("NaN or infinite weights in 1 tensors (model.norm.weight)" in error for error in found)


def test_a_partitioned_tied_head_trains_as_a_whole_one(tmp_path, tiny_chat):
    """ZeRO-3 in two workers, activations recomputed, against stage 1 in one."""
    config = score(tmp_path, tiny_chat, tied=True)
    sharded = trained(config, tmp_path / "sharded", workers=2, train={"gradient_checkpointing": True})
    whole = trained(config, tmp_path / "whole", train={"zero_stage": 1})
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert metrics(sharded, name) == pytest.approx(metrics(whole, name), rel=1e-5, abs=1e-6), name
    ours, theirs = weights(sharded), weights(whole)
    assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_scores_of_another_model_stop_the_run_before_its_first_update(scored, tmp_path, tiny_chat):
    other = save_model(tmp_path / "other", tiny_chat, seed=7)
    launch([copied(scored, tmp_path / "run", model={"name_or_path": str(other)})], may_stop=True)
    (error,) = errors(tmp_path / "run")
    assert "policy and reference differ" in error
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
