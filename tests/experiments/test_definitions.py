"""The paper's experiments as data: their arms, and the folder of each."""

from __future__ import annotations

import pytest

from bdpo.config import parse_config
from bdpo.config.derive import part_of, value_at
from bdpo.errors import UserError
from bdpo.experiments.arms import (
    ExperimentRecord,
    arm_run,
    base_run,
    experiment_results,
    run_at,
)
from bdpo.experiments.definitions import EXPERIMENTS
from bdpo.storage.paths import discard
from bdpo.storage.run_dir import RunDir
from tests.support.helpers import tiny_config

ARMS = {
    "imbalance": [],
    "balanced-subset": ["balanced", "imbalanced"],
    "methods": ["bdpo", "dpo", "cpo", "simpo", "safedpo"],
    "ablation": ["bdpo", "dpo", "dpo_bw", "dpo_sf", "bdpo-softmax", "bdpo-bos"],
    "alpha": ["dpo", "alpha-0.5", "alpha-1.0", "alpha-1.5", "alpha-2.0", "alpha-2.5", "alpha-3.0"],
    "beta": ["dpo", "beta-0.02", "beta-0.05", "beta-0.1", "beta-0.2", "beta-0.5"],
    "displacement": ["dpo", "bdpo"],
    "reestimation": ["bdpo", "follows-policy", "follows-mix"],
}


@pytest.fixture
def config(tmp_path):
    changes = {"method": {"beta": 0.3}, "train": {"num_train_epochs": 2}}
    return tiny_config(tmp_path / "run", tmp_path / "model", tmp_path / "pairs", **changes)


def settings_of(config, name, seed=7):
    run = RunDir(config.run_dir)
    return {arm.name: arm_run(config, run, arm, seed) for arm in EXPERIMENTS[name].arms(config)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_config_of_its_own_in_a_folder_of_its_own(config, name):
    arms = settings_of(config, name)
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


@pytest.mark.parametrize("name", ARMS)
def test_the_arms_are_those_of_the_paper(config, name):
    assert list(settings_of(config, name)) == ARMS[name]


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
    [arm, *_] = EXPERIMENTS["methods"].arms(config)
    run = RunDir(config.run_dir)
    of = {part: part_of(config, part) for part in ("all", "search", "held_out")}
    assert len({arm_run(settings, run, arm, 0)[1].root for settings in of.values()}) == 3
    assert len({base_run(settings, run).root for settings in of.values()}) == 3
    assert base_run(of["all"], run) is run


def test_starting_over_leaves_other_experiments_their_tables(config, tmp_path):
    run = RunDir(config.run_dir)
    [arm, *_] = EXPERIMENTS["methods"].arms(config)
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


def test_the_ablation_of_a_run_without_weights_is_of_the_first_rule(config):
    config = parse_config(config.model_dump() | {"method": {"balance": "none"}}, "test")
    arms = settings_of(config, "ablation").items()
    rules = {arm: value_at(settings, "method.balance") for arm, (settings, _) in arms}
    assert rules["bdpo"] == rules["dpo_bw"] == rules["bdpo-bos"] == "ratio"
    assert rules["bdpo-softmax"] == "softmax"


def test_halves_are_of_all_pairs(config):
    config = parse_config(config.model_dump() | {"data": {"path": "x", "select": {"ches": [0, 0.6]}}}, "test")
    with pytest.raises(UserError, match="leave it out"):
        EXPERIMENTS["balanced-subset"].arms(config)


def test_a_record_is_read_as_it_was_written(config, tmp_path):
    arms = EXPERIMENTS["alpha"].arms(config)
    record = ExperimentRecord(config, arms, arms[:1], ("a note",))
    record.write(tmp_path)
    assert ExperimentRecord.read(tmp_path) == record
    with pytest.raises(UserError, match="experiment nothing"):
        ExperimentRecord.read(tmp_path / "nothing")


def test_the_folder_of_an_arm_has_the_pairs_and_scores_of_its_run(config):
    run = RunDir(config.run_dir)
    run.open(config).release()
    for name in ("dpo", "bdpo-bos"):
        arm = next(arm for arm in EXPERIMENTS["ablation"].arms(config) if arm.name == name)
        settings, folder = arm_run(config, run, arm, 3)
        folder.record(settings)
        assert vars(run_at(folder.root)) == vars(folder)
    assert vars(run_at(run.root)) == vars(run)
