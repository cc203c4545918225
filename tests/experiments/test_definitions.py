"""Arms as data, and what is said of their results: by formulas of the test's own."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdpo.config import parse_config
from bdpo.config.derive import part_of, value_at
from bdpo.errors import UserError
from bdpo.evaluation.answers import prompts_fingerprint
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.evaluation.measures import summarise
from bdpo.experiments.arms import (
    Arm,
    Record,
    arm_run,
    base_run,
    experiment_results,
    run_at,
)
from bdpo.experiments.definitions import EXPERIMENTS, experiment
from bdpo.experiments.results import arm_differences, item_means, summarise_arms
from bdpo.stats import Estimate
from bdpo.storage.manifests import write_manifest
from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from bdpo.variants.objective import InvalidEvaluation, Measured
from pipelines.experiment import _usable, best_trial
from pipelines.prepare import Prepare
from pipelines.runtime import arms
from pipelines.runtime.arms import jobs_of
from pipelines.runtime.experiment_results import write_results
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.score_rows import evaluated, row, table

ARMS = {
    "imbalance": [],
    "balanced-subset": ["balanced", "imbalanced"],
    "methods": ["bdpo", "dpo", "cpo", "simpo", "safedpo"],
    "ablation": ["bdpo", "dpo", "dpo_bw", "dpo_sf", "bdpo-softmax", "bdpo-bos"],
    "alpha": ["dpo", "alpha-0.5", "alpha-1.0", "alpha-1.5", "alpha-2.0", "alpha-2.5", "alpha-3.0"],
    "beta": ["dpo", "beta-0.02", "beta-0.05", "beta-0.1", "beta-0.2", "beta-0.5"],
    "displacement": ["dpo", "bdpo"],
}


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs", method={"beta": 0.3})


def settings_of(config, name, seed=7):
    run = RunDir(config.run_dir)
    return {arm.name: arm_run(config, run, arm, seed) for arm in experiment(name, config).arms}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_config_of_its_own_in_a_folder_of_its_own(config, name):
    arms = settings_of(config, name)
    assert list(arms) == ARMS[name]
    made = [settings.model_dump(exclude={"run_dir"}) for settings, _ in arms.values()]
    assert all(made.count(one) == 1 for one in made)
    folders = set()
    for settings, run in arms.values():
        assert settings.seed == 7
        assert settings.run_dir == str(run.root)
        *_, experiments, all_arms, arm, seed = run.root.parts
        assert (experiments, all_arms, seed) == ("experiments", "arms", "seed-7")
        assert run.pairs == RunDir(config.run_dir).pairs
        assert run.private == RunDir(config.run_dir).private / "experiments" / "arms" / arm / "seed-7"
        folders.add(arm)
    assert len(folders) == len(arms)


def test_arms_of_all_experiments_share_a_folder_if_and_only_if_they_train_the_same(config):
    made = {}
    for name in EXPERIMENTS:
        for arm, (settings, run) in settings_of(config, name).items():
            values = settings.model_dump(exclude={"run_dir"})
            first, whose = made.setdefault(run.root.parent.name, (values, f"{name}, {arm}"))
            assert first == values, (whose, name, arm)
    values = [first for first, _ in made.values()]
    assert all(values.count(one) == 1 for one in values)
    assert {"dpo", "bdpo", "simpo", "bdpo-alpha-2.0", "bdpo-balance-softmax", "bdpo-unconditional-bos"} < set(
        made
    )
    assert "dpo-select-mi_difference-0.0-0.5" in made


def test_arms_on_a_part_of_the_prompts_are_kept_apart(config):
    [arm, *_] = experiment("methods", config).arms
    run = RunDir(config.run_dir)
    of = {part: part_of(config, part) for part in ("all", "search", "held_out")}
    assert len({arm_run(settings, run, arm, 0)[1].root for settings in of.values()}) == 3
    assert len({base_run(settings, run).root for settings in of.values()}) == 3
    assert base_run(of["all"], run) is run


def test_starting_over_leaves_other_experiments_their_tables(config, tmp_path):
    run = RunDir(config.run_dir)
    [arm, *_] = experiment("methods", config).arms
    _, folder = arm_run(config, run, arm, 0)
    own, other = (run.root / "experiments" / name / "results.csv" for name in ("methods", "beta"))
    base = base_run(part_of(config, "search"), run)
    texts = [folder.private / "responses", base.private / "responses"]
    for file in (folder.model / "w", run.scores / "s", base.eval("base") / "e", own, other, *texts):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    discard(*experiment_results(run, "methods"))
    assert [file for file in run.root.rglob("*") if file.is_file()] == [other]


def test_methods_keep_the_run_s_beta_and_simpo_its_own(config):
    betas = {name: settings.method.beta for name, (settings, _) in settings_of(config, "methods").items()}
    assert betas == {"bdpo": 0.3, "dpo": 0.3, "cpo": 0.3, "safedpo": 0.3, "simpo": 2.0}


def test_the_halves_are_of_plain_dpo(config):
    arms = settings_of(config, "balanced-subset")
    for arm, bounds in (("balanced", [0.0, 0.5]), ("imbalanced", [0.5, 1.0])):
        assert arms[arm][0].method.name == "dpo"
        assert arms[arm][0].data.select.mi_difference == bounds


def test_all_arms_share_the_scores_but_those_of_another_context(config):
    own = RunDir(config.run_dir).scores
    folders = {name: run.scores for name, (_, run) in settings_of(config, "ablation").items()}
    other = folders.pop("bdpo-bos")
    assert set(folders.values()) == {own}
    assert other == RunDir(config.run_dir).root / "experiments" / "context-bos" / "scores"


harms = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=3)


@given(st.lists(harms, min_size=1, max_size=4), st.lists(harms, min_size=1, max_size=4))
def test_results_are_means_over_prompts_and_seeds(first, second):
    results = summarise_arms(
        {"a": evaluated(*map(table, first)), "b": evaluated(*map(table, second))}, "a"
    ).to_pylist()
    safety = {row["arm"]: row for row in results if row["measure"] == "safety"}
    for arm, seeds in (("a", first), ("b", second)):
        values = [1 - statistics.mean(h) for h in seeds]
        assert safety[arm]["value"] == pytest.approx(statistics.mean(values))
        assert safety[arm]["seed_low"] == pytest.approx(min(values))
        assert safety[arm]["seed_high"] == pytest.approx(max(values))
        assert (safety[arm]["n"], safety[arm]["seeds"]) == (3, len(seeds))
        assert safety[arm]["low"] <= safety[arm]["value"] + 1e-12
        assert safety[arm]["high"] >= safety[arm]["value"] - 1e-12
    assert safety["a"]["p"] is None
    difference = safety["b"]["value"] - safety["a"]["value"]
    assert safety["b"]["difference"] == pytest.approx(difference)


def test_an_arm_that_is_better_everywhere_is_found_to_be():
    worse, better = [1.0] * 10 + [0.5] * 10, [0.5] * 10 + [0.0] * 10
    row = next(
        row
        for row in summarise_arms(
            {"a": evaluated(table(worse)), "b": evaluated(table(better))}, "a"
        ).to_pylist()
        if row["arm"] == "b" and row["measure"] == "safety"
    )
    assert row["difference"] == 0.5
    assert row["p"] < 0.001


def test_a_prompt_without_verdict_at_one_seed_counts_at_none():
    whole, part = table([0.0, 1.0, 0.5]), table([0.0, None, 0.5])
    assert item_means([{"a": 1.0, "b": 0.0}, {"b": 1.0}]) == ({"b": 0.5}, 1)
    for seeds in ([whole, part], [part, whole]):
        first, *_ = summarise_arms({"a": evaluated(*seeds)}, "a").to_pylist()
        assert (first["value"], first["n"], first["dropped"]) == (0.75, 2, 1)


def test_a_measure_that_a_seed_lacks_is_left_out_whatever_their_order():
    whole, nothing = table([0.0], [False]), table([None], [False])
    for seeds in ([whole, nothing], [nothing, whole]):
        results = summarise_arms({"a": evaluated(*seeds)}, "a").to_pylist()
        assert {row["benchmark"] for row in results} == {"xstest"}


def test_a_comparison_is_of_the_prompts_that_both_arms_have():
    """By hand: the reference lacks the second prompt, on which the other arm is worst."""
    results = summarise_arms(
        {"a": evaluated(table([0.0, None])), "b": evaluated(table([0.0, 1.0]))}, "a"
    ).to_pylist()
    row = next(row for row in results if row["arm"] == "b" and row["measure"] == "safety")
    assert (row["value"], row["first"], row["second"], row["paired_n"]) == (0.5, 1.0, 1.0, 1)


def test_every_two_arms_differ_by_what_their_prompts_say():
    """By formula, each prompt's mean over the seeds; and as `summarise_arms` has it."""
    harms = {"a": [[1.0, 0.0, 0.5], [1.0, 1.0, 0.5]], "b": [[0.0, 0.0, 0.25]], "c": [[0.5, None, 0.5]]}
    found = {
        arm: evaluated(*(table(h, [arm == "b"]) for h in seeds), accuracy=[True])
        for arm, seeds in harms.items()
    }
    rows = {(r["reference"], r["arm"], r["measure"]): r for r in arm_differences(found).to_pylist()}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(rows) == [(*pair, measure) for pair in pairs for measure in ("safety", "compliance")]
    safe = {"a": [0.0, 0.5, 0.5], "b": [1.0, 1.0, 0.75], "c": [0.5, None, 0.5]}
    for first, second in pairs:
        both = [(x, y) for x, y in zip(safe[first], safe[second], strict=True) if y is not None]
        row = rows[first, second, "safety"]
        assert row["difference"] == pytest.approx(statistics.mean(y - x for x, y in both))
        assert row["paired_n"] == len(both)
    assert rows["b", "c", "compliance"]["difference"] == 1.0
    for row in summarise_arms(found, "a").to_pylist():
        if row["arm"] != "a" and row["measure"] in ("safety", "compliance"):
            same = rows["a", row["arm"], row["measure"]]
            assert same == {key: row.get(key) for key in same} | {"reference": "a"}


def test_without_the_reference_nothing_is_tested():
    """The first of those that are left must not take its place."""
    results = summarise_arms({"b": evaluated(table([0.0])), "c": evaluated(table([1.0]))}, "a").to_pylist()
    assert {row["arm"] for row in results} == {"b", "c"}
    assert all(row["p"] is None and row["difference"] is None for row in results)


def test_the_ablation_of_a_run_without_weights_is_of_the_first_rule(config):
    config = parse_config(config.model_dump() | {"method": {"balance": "none"}}, "test")
    arms = settings_of(config, "ablation").items()
    rules = {arm: value_at(settings, "method.balance") for arm, (settings, _) in arms}
    assert rules["bdpo"] == rules["dpo_bw"] == rules["bdpo-bos"] == "ratio"
    assert rules["bdpo-softmax"] == "softmax"


def test_halves_are_of_all_pairs(config):
    config = parse_config(config.model_dump() | {"data": {"path": "x", "select": {"ches": [0, 0.6]}}}, "test")
    with pytest.raises(UserError, match="leave it out"):
        experiment("balanced-subset", config)


def test_a_record_is_read_as_it_was_written(config, tmp_path):
    arms = experiment("alpha", config).arms
    record = Record(config, arms, arms[:1], ("a note",))
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    with pytest.raises(UserError, match="experiment nothing"):
        Record.read(tmp_path / "nothing")


def test_the_folder_of_an_arm_has_the_pairs_and_scores_of_its_run(config):
    run = RunDir(config.run_dir)
    run.open(config).release()
    for name in ("dpo", "bdpo-bos"):
        arm = next(arm for arm in experiment("ablation", config).arms if arm.name == name)
        settings, folder = arm_run(config, run, arm, 3)
        folder.record(settings)
        assert vars(run_at(folder.root)) == vars(folder)
    assert vars(run_at(run.root)) == vars(run)


def test_an_arm_that_the_data_do_not_allow_is_left_out_and_named(tmp_path, tiny_chat):
    rows = [{k: value for k, value in row.items() if not k.endswith("_safe")} for row in invented_pairs(4)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), pairs)
    run = RunDir(config.run_dir)
    Prepare(config, run).complete()
    usable, [note] = _usable(config, run, experiment("methods", config).arms)
    assert [arm.name for arm in usable] == ["bdpo", "dpo", "cpo", "simpo"]
    assert "safedpo" in note
    assert "chosen_safe" in note


def test_answers_that_were_sampled_are_not_taken_for_greedy_ones(tmp_path, tiny_chat):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(4))
    files = {"strongreject_path": str(tmp_path / "s.csv"), "benchmarks": ["strongreject"]}
    (tmp_path / "s.csv").write_text("category,source,forbidden_prompt\na,x,take the amber\n")
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), pairs, evaluate=files)
    run = RunDir(config.run_dir)
    Prepare(config, run).complete()
    [job] = jobs_of(config, run, experiment("methods", config).arms[:1], [0])
    greedy = prompts_fingerprint(config) | judge_fingerprint(config) | {"weights": "of the model"}
    write_manifest(job.run.eval("trained") / "summary.json", greedy)
    job.refuse_other()
    write_manifest(job.run.eval("trained") / "summary.json", greedy | {"evaluate.temperature": 0.7})
    with pytest.raises(UserError, match=r"evaluate.temperature=0.7"):
        job.refuse_other()


def test_an_invalid_evaluation_of_an_arm_is_a_fault(monkeypatch, config):
    monkeypatch.setattr(arms.Train, "complete", lambda stage: {})
    unjudged = summarise([row(n, 0.0 if n == 3 else None) for n in range(4)])
    monkeypatch.setattr(arms.EvaluateTrained, "complete", lambda stage: unjudged)
    [job] = jobs_of(config, RunDir(config.run_dir), experiment("methods", config).arms[:1], [0])
    with pytest.raises(InvalidEvaluation, match="3 of 4 unjudged"):
        arms.ArmActor().run(job)


def test_benchmarks_are_kept_apart():
    results = summarise_arms(
        {"a": evaluated(table([0.0], [False, True, False, False]), accuracy=[True, False])}, "a"
    ).to_pylist()
    assert {(row["benchmark"], row["measure"]): row["value"] for row in results} == {
        ("strongreject", "safety"): 1.0,
        ("strongreject", "safe_rate"): 1.0,
        ("xstest", "compliance"): 0.75,
        ("gsm8k", "accuracy"): 0.5,
    }


def measured(score, compliance, violation=0.0):
    objective, constrained = (Estimate(value, value, value, 9, "t") for value in (score, compliance))
    return Measured(objective, constrained, 1.0, violation)


def test_the_best_learning_rate_is_that_of_a_search():
    """The safest within the bound; of equals the one that complies more; else the nearest to the bound."""
    trials = [Arm(name) for name in "abcd"]
    found = {"a": measured(0.7, 0.9), "b": measured(0.7, 0.95), "c": measured(0.9, 0.5, violation=0.4)}
    assert best_trial(trials, found) == trials[1]
    far = {"a": measured(0.9, 0.2, violation=0.7), "d": measured(0.8, 0.5, violation=0.4)}
    assert best_trial(trials, far) == trials[3]
    assert best_trial(trials, {}) is None


def test_what_diverged_is_known_again_and_nothing_else(tmp_path, tiny_chat):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(4))
    config = tiny_config(tmp_path / "run", save_model(tmp_path / "model", tiny_chat), pairs)
    run = RunDir(config.run_dir)
    Prepare(config, run).complete()
    [job] = jobs_of(config, run, experiment("methods", config).arms[:1], [0])
    job.record(RuntimeError("a node died"))
    assert job.diverged is None
    job.record(FloatingPointError("the loss is not finite: pairs a, b"))
    assert job.diverged == "the loss is not finite: pairs a, b"
    train = config.train.model_dump() | {"warmup_ratio": 0.5}
    other = parse_config(config.model_dump() | {"train": train}, "test")
    [changed] = jobs_of(other, run, experiment("methods", other).arms[:1], [0])
    with pytest.raises(UserError, match=r"train\.warmup_ratio"):
        assert changed.diverged


def test_a_page_whose_trainings_are_gone_stays_as_it_is(config):
    run = RunDir(config.run_dir)
    folder = run.part("experiments", "methods").root
    Record(config, experiment("methods", config).arms).write(folder)
    (folder / "results.csv").write_text("of another day")
    with pytest.raises(UserError, match="stays as it is"):
        write_results(run, "methods")
    assert (folder / "results.csv").read_text() == "of another day"
