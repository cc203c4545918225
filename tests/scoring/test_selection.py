"""What methods require of the pairs: without scores, and with safety labels."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bdpo.config import Config, parse_config
from bdpo.config.data import SelectConfig
from bdpo.data.pairs import pairs_digest, read_pairs
from bdpo.data.prepare import prepare
from bdpo.errors import UserError
from bdpo.method.base import PairLogps
from bdpo.method.losses import METHODS
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.reference import ReferenceScorer
from bdpo.scoring.scores import SCORE_SCHEMA, finish_scores, score_fingerprint, score_store
from bdpo.scoring.selection import (
    count_tokens,
    require_benign_pairs,
    require_labels,
    requires_scores,
    safety_account,
    selected,
    training_rows,
)
from bdpo.scoring.shard_scorer import ShardScorer
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import TrainingPlan
from bdpo.training.loop import _require_reference
from bdpo.training.pairs import TrainingPairs
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.training import launch, metrics

PAIRS = 24

SELECT_SAFE = SelectConfig(group="safe")

LABELS = [(True, False), (True, True), (False, True), (False, False)]  # chosen, rejected is safe


def labelled_pairs():
    """A quarter each of all labels, in no order."""
    rows = invented_pairs(PAIRS)
    for i, row in enumerate(rows):
        row["chosen_safe"], row["rejected_safe"] = LABELS[i * 7 % 4]
    return rows


def prepared(folder, chat, rows, method) -> tuple[Config, RunDir]:
    model = save_model(folder / "model", chat)
    data = write_jsonl(folder / "pairs.jsonl", rows)
    config = tiny_config(folder / "run", model, data, method={"name": method})
    run = RunDir(config.run_dir)
    run.open(config)
    prepare(config.data, load_tokenizer(config.model), run.pairs, run.private, seed=0)
    write_manifest(run.data / "manifest.json", {}, pairs_digest=pairs_digest(run.pairs))
    return config, run


def scored(config, run):
    fingerprint = score_fingerprint(config, run)
    ShardScorer(config, run, fingerprint, "cpu")({"first": 0, "rows": PAIRS})
    finish_scores(run, fingerprint, 0)
    return score_store(run, fingerprint).read()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.requires_reference])
def test_a_method_without_reference_requires_token_counts_alone(tmp_path, tiny_chat, name):
    config, run = prepared(tmp_path, tiny_chat, labelled_pairs(), name)
    rows = training_rows(config, run)
    expected = ReferenceScorer(config, "cpu").score(read_pairs(run.pairs, 0, PAIRS))
    known = ["pair_id", "group", "prompt_tokens", "chosen_tokens", "rejected_tokens"]
    assert rows.schema == expected.schema
    assert rows.select(known).equals(expected.select(known))
    assert all(rows[column].null_count == PAIRS for column in set(rows.column_names) - set(known))


def test_trainings_without_scores_are_simpo_and_sft_from_their_first_step(tmp_path, tiny_chat):
    """Before the first update the policy is what the reference scorer would have scored with."""
    made = {name: prepared(tmp_path / name, tiny_chat, labelled_pairs(), name) for name in ("simpo", "sft")}
    for _, run in made.values():
        pq.write_table(count_tokens(run), run.root / "scores.parquet")
    launch([config for config, _ in made.values()])
    config, run = made["simpo"]
    data = TrainingPairs.load(config, run, training_rows(config, run))
    batch = TrainingPlan(data.lengths, config.train, config.seed).global_batch(0)
    scores = ReferenceScorer(config, "cpu").score(read_pairs(run.pairs, 0, PAIRS).take(batch)).to_pylist()
    losses = [
        math.log1p(
            math.exp(
                0.5
                - 2.0 * row["ref_chosen_logps"] / row["chosen_tokens"]
                + 2.0 * row["ref_rejected_logps"] / row["rejected_tokens"]
            )
        )
        for row in scores
    ]
    assert metrics(run)[0] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert len(metrics(run)) == 3
    assert run.model.is_dir()
    sft = made["sft"][1]
    likelihoods = [-row["ref_chosen_logps"] / row["chosen_tokens"] for row in scores]
    assert metrics(sft)[0] == pytest.approx(sum(likelihoods) / 8, rel=1e-5)
    assert sft.model.is_dir()


def test_safedpo_trains_on_pairs_with_a_safe_response_alone(tmp_path, tiny_chat):
    config, run = prepared(tmp_path, tiny_chat, labelled_pairs(), "safedpo")
    scores = scored(config, run)
    rows = training_rows(config, run)
    labels = {row["pair_id"]: row for row in read_pairs(run.pairs, 0, PAIRS).to_pylist()}
    usable = [
        name
        for name in scores["pair_id"].to_pylist()
        if labels[name]["chosen_safe"] or labels[name]["rejected_safe"]
    ]
    assert len(usable) == 18
    assert rows["pair_id"].to_pylist() == usable
    assert safety_account(config, run) == {"kept": 12, "swapped": 6, "dropped": 6}
    safe = config.model_copy(update={"data": config.data.model_copy(update={"select": SELECT_SAFE})})
    account, selected_rows = safety_account(safe, run), training_rows(safe, run)
    assert 0 < selected_rows.num_rows < 18
    assert account["kept"] + account["swapped"] == selected_rows.num_rows
    assert sum(account.values()) == sum(row["group"] == "safe" for row in labels.values())

    data = TrainingPairs.load(config, run, rows)
    assert data.ids.to_pylist() == usable
    plan = TrainingPlan(data.lengths, config.train, config.seed)
    assert plan.steps_per_epoch == 3, "18 pairs in batches of 8"
    pq.write_table(rows, run.root / "scores.parquet")
    launch([config])
    for step, size in enumerate((8, 8, 2)):
        batch = [labels[usable[i]] for i in plan.global_batch(step)]
        assert len(batch) == size
    # at Δ = 0 the loss is ln 2 of two safe responses, -log σ(-10) of an unsafe one beside a safe one
    one_unsafe = [
        row["chosen_safe"] != row["rejected_safe"]
        for row in (labels[usable[i]] for i in plan.global_batch(0))
    ]
    expected = sum(math.log1p(math.exp(10.0 * unsafe)) for unsafe in one_unsafe) / 8
    assert metrics(run)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lacking", ["chosen_safe", "rejected_safe"])
def test_pairs_without_labels_are_refused_with_their_number(tmp_path, tiny_chat, lacking):
    rows = labelled_pairs()
    for row in rows[:5]:
        row[lacking] = None
    config, run = prepared(tmp_path, tiny_chat, rows, "safedpo")
    for refuse in (require_labels, training_rows):
        with pytest.raises(UserError, match=r"method\.name=safedpo: .* 5 of 24 in data\.path=.* lack them"):
            refuse(config, run)


def test_pairs_of_unsafe_responses_alone_are_refused(tmp_path, tiny_chat):
    rows = [row | {"chosen_safe": False, "rejected_safe": False} for row in labelled_pairs()]
    config, run = prepared(tmp_path, tiny_chat, rows, "safedpo")
    scored(config, run)
    with pytest.raises(UserError, match="both responses are unsafe in every pair"):
        training_rows(config, run)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.requires_reference])
def test_a_policy_that_is_not_the_reference_is_found_by_every_loss_that_has_one(tmp_path, name):
    config = tiny_config(tmp_path, tmp_path, tmp_path, method={"name": name})
    reference = torch.tensor([-20.0, -31.0]), torch.tensor([-25.0, -18.0])
    labels = torch.tensor([False, False]), torch.tensor([False, True])
    rest = (
        torch.tensor([9, 5]),
        torch.tensor([7, 8]),
        torch.tensor([0.4, 1.1]),
        torch.tensor([1.1, 0.4]),
        *labels,
    )

    def check(moved):
        pairs = PairLogps(reference[0] + moved, reference[1], *reference, *rest)
        _require_reference(pairs, config)

    check(1e-5)
    with pytest.raises(UserError, match="policy and reference differ by"):
        check(0.1)


def test_two_halves_share_no_pair_and_leave_none_in_any_group(tmp_path, tiny_chat):
    rows = invented_pairs(PAIRS)
    for i, row in enumerate(rows):
        row["group"] = ("safe", "unsafe")[i % 3 == 0]
    config, run = prepared(tmp_path, tiny_chat, rows, "dpo")
    scores = scored(config, run)
    far = {
        row["pair_id"]: abs(row["mi_chosen"] - row["mi_rejected"]) for row in scores.to_pylist()
    }  # the definition, without ranks
    for key, value in (("mi_difference", far), ("ches", ches_of(scores))):
        low, high = (
            training_rows(with_select(config, {key: bounds}), run) for bounds in ([0.0, 0.5], [0.5, 1.0])
        )
        ids = [set(half["pair_id"].to_pylist()) for half in (low, high)]
        assert not ids[0] & ids[1]
        assert len(ids[0] | ids[1]) == PAIRS
        for group in ("safe", "unsafe"):
            lower, upper = (
                [float(value[row["pair_id"]]) for row in half.to_pylist() if row["group"] == group]
                for half in (low, high)
            )
            assert abs(len(lower) - len(upper)) <= 1
            assert max(lower) <= min(upper)


@pytest.mark.parametrize("key", ["mi_difference", "ches"])
def test_pairs_without_a_group_are_ranked_among_themselves(tmp_path, key):
    """Data without groups is selected from, too; beside groups they are a group of their own."""
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    values = [0.9, 0.1, 0.8, 0.3, 0.2, 0.7, 0.4, 0.6]
    for groups, lower in ([None] * 8, [1, 3, 4, 6]), ([None, None, "safe", "safe"] * 2, [1, 3, 4, 6]):
        scores = score_rows(groups, values)
        for bounds, expected in (([0.0, 0.5], lower), ([0.5, 1.0], sorted({*range(8)} - {*lower}))):
            keep = selected(with_select(config, {key: bounds}), scores)
            assert np.flatnonzero(keep).tolist() == expected


@pytest.mark.parametrize(
    ("tamper", "groups", "refused"),
    [
        (None, {"unsafe": 3}, False),
        ({}, {"unsafe": 3}, True),
        ({}, {"unsafe": 3, "safe": 1}, False),
        ({"data": {"path": "benign.jsonl"}}, {"unsafe": 3}, False),
    ],
)
def test_a_tamper_test_requires_benign_pairs(tmp_path, tamper, groups, refused):
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    config = parse_config(config.model_dump() | {"tamper": tamper}, "test")
    run = RunDir(config.run_dir)
    write_manifest(run.data / "manifest.json", {}, account={"groups": groups})
    with pytest.raises(UserError, match=r"no pair of .* has group=safe") if refused else nullcontext():
        require_benign_pairs(config, run)


def test_one_group_alone_is_selected(tmp_path):
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    scores = score_rows(["safe", "unsafe", None, "safe"], [0.1, 0.2, 0.3, 0.4])
    assert selected(with_select(config, {"group": "safe"}), scores).tolist() == [True, False, False, True]
    half = selected(with_select(config, {"group": "safe", "ches": [0.0, 0.5]}), scores)
    assert half.tolist() == [True, False, False, False]


def test_of_equal_pairs_the_first_rows_are_the_lower_ones(tmp_path):
    """Whatever sorts them: two halves are complements on every machine."""
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    scores = score_rows([None] * 100, [0.5] * 100)
    keep = selected(with_select(config, {"mi_difference": [0.0, 0.3]}), scores)
    assert np.flatnonzero(keep).tolist() == list(range(30))


def score_rows(groups, values):
    """Rows of scores with these groups, differences in mutual information and CHES."""
    of = {"group": groups, "mi_chosen": [0.0] * len(values), "mi_rejected": values, "ches": values}
    return pa.table({name: of.get(name) or pa.nulls(len(values)) for name in SCORE_SCHEMA.names}).cast(
        SCORE_SCHEMA
    )


def test_a_selection_is_of_all_pairs_whatever_else_the_method_leaves_out(tmp_path, tiny_chat):
    config, run = prepared(tmp_path, tiny_chat, labelled_pairs(), "dpo")
    scored(config, run)
    half = with_select(config, {"mi_difference": [0.5, 1.0]})
    chosen = set(training_rows(half, run)["pair_id"].to_pylist())
    safe = half.model_copy(update={"method": METHODS["safedpo"]()})
    everything = config.model_copy(update={"method": safe.method})
    usable = set(training_rows(everything, run)["pair_id"].to_pylist())
    assert set(training_rows(safe, run)["pair_id"].to_pylist()) == chosen & usable


def test_a_method_without_reference_requires_scores_where_they_select(tmp_path, tiny_chat):
    config, run = prepared(tmp_path, tiny_chat, labelled_pairs(), "cpo")
    half = with_select(config, {"ches": [0.0, 0.5]})
    assert requires_scores(half)
    assert not requires_scores(config)
    with pytest.raises(UserError, match="no finished scores"):
        training_rows(half, run)
    scored(config, run)
    assert training_rows(half, run).num_rows == PAIRS // 2


def test_a_selection_that_cannot_be_made_is_one_line(tmp_path, tiny_chat):
    config, run = prepared(tmp_path, tiny_chat, labelled_pairs(), "dpo")
    scores = scored(config, run)
    column = scores.schema.get_field_index("ches")
    unknown = scores.set_column(column, scores.schema.field("ches"), pa.nulls(PAIRS, pa.float32()))
    with pytest.raises(UserError, match="without CHES"):
        selected(with_select(config, {"ches": [0.0, 0.5]}), unknown)
    with pytest.raises(UserError, match="none of the 24 pairs"):
        selected(with_select(config, {"mi_difference": [0.0, 0.001]}), scores)
    for bounds in ([0.5], [0.5, 0.5], [-0.1, 1.0], [0.2, 1.1]):
        with pytest.raises(UserError, match=r"data.select.ches: expects \[low, high\]"):
            with_select(config, {"ches": bounds})


def ches_of(scores):
    return {row["pair_id"]: row["ches"] for row in scores.to_pylist()}


def with_select(config, select):
    values = config.model_dump()
    return parse_config({**values, "data": {**values["data"], "select": select}}, "test")
