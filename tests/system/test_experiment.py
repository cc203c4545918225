"""An experiment as its users run it: killed on the way, and the same command again."""

from __future__ import annotations

import csv

import pytest
import yaml

from bdpo.storage.run_dir import RunDir
from tests.support.commands import kill_with_cluster, run_command
from tests.support.sweeps import start, sweep_config, wait_for

pytestmark = pytest.mark.ray

SEED = 1

HALVES = {"balanced": "0.0-0.5", "imbalanced": "0.5-1.0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_chat):
    """The balanced-subset experiment at a seed, its driver killed after the first training."""
    folder = tmp_path_factory.mktemp("experiment")
    values = sweep_config(folder, tiny_chat).model_dump() | {"experiment": {"seeds": [SEED]}}
    values["train"]["workers"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    process = start(folder, "-m", "pipelines.experiment", "balanced-subset", *arguments(folder))
    wait_for(process, arm(folder, "balanced").eval("trained") / "summary.json")
    kill_with_cluster(process)
    return folder


def arguments(folder):
    return "--config", str(folder / "config.yaml"), "experiment.max_concurrent_arms=1"


def arm(folder, name):
    name = f"dpo-select-mi_difference-{HALVES[name]}"
    return RunDir(folder / "run" / "experiments" / "arms" / name / f"seed-{SEED}")


def run(folder, name="balanced-subset", *overrides):
    return run_command("pipelines.experiment", name, *arguments(folder), *overrides)


@pytest.fixture(scope="module")
def finished(folder):
    """(what was there after the kill and when it was written, what the same command said)"""
    before = stamps(arm(folder, "balanced").root)
    code, out, err = run(folder)
    assert code == 0, out + err
    return before, out


def stamps(root):
    return {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}


def test_what_was_done_before_the_kill_is_not_done_again(finished, folder):
    before, out = finished
    assert "1 to do" in out
    assert before
    assert before == stamps(arm(folder, "balanced").root)


def test_every_arm_is_trained_on_its_half_and_evaluated(finished, folder):
    for name in ("balanced", "imbalanced"):
        run = arm(folder, name)
        assert run.has_model()
        assert (run.eval("trained") / "summary.json").is_file()
        values = yaml.safe_load(run.config.read_text())
        assert values["seed"] == SEED
        assert values["data"]["select"]["mi_difference"] == {"balanced": [0.0, 0.5]}.get(name, [0.5, 1.0])
    assert not list(arm(folder, "balanced").root.glob("scores"))


def test_results_page_and_figures_are_there_and_hold_no_text(finished, folder):
    root = folder / "run" / "experiments" / "balanced-subset"
    rows = list(csv.DictReader((root / "results.csv").open()))
    assert {row["arm"] for row in rows} == {"balanced", "imbalanced", "base"}
    assert {row["seeds"] for row in rows if row["arm"] != "base"} == {"1"}
    html = (root / "report.html").read_text()
    for shown in ("Figures 3 and 4", "imbalanced", "reward margin", "All measures"):
        assert shown in html
    for figure in ("arms", "mi", "curve-rewards-margins"):
        assert (root / f"{figure}.png").stat().st_size > 5000
    for word in ("cedar", "plant the"):
        assert word not in html
    assert list((folder / "run" / "private" / "experiments").rglob("*.parquet"))


def test_the_same_command_again_trains_nothing(finished, folder):
    before = stamps(folder / "run" / "experiments" / "arms")
    code, out, err = run(folder)
    assert code == 0, err
    assert "to do" not in out
    assert before == stamps(folder / "run" / "experiments" / "arms")


def test_results_of_another_config_are_refused(finished, folder):
    root = folder / "run" / "experiments"
    before = (root / "balanced-subset" / "experiment.json").read_bytes()
    for name, override in (("balanced-subset", "train.learning_rate=0.5"), ("alpha", "train.workers=99")):
        code, _, err = run(folder, name, override)
        assert code == 2
        assert override.partition("=")[0] in err
    assert (root / "balanced-subset" / "experiment.json").read_bytes() == before
    assert not (root / "alpha").exists()


@pytest.fixture(scope="module")
def beta(finished, folder):
    """A curve over β, one of which is infinite in float32: its first loss is no number."""
    return run(folder, "beta", "experiment.betas=[0.1, 1e39]", f"experiment.seeds=[{SEED}]")


def test_an_arm_that_cannot_be_trained_is_named_and_the_others_are_on_the_page(beta, folder):
    code, out, _ = beta
    assert code == 1
    assert "arm beta-1e+39, seed 1: " in out
    code, again, _ = run(folder, "beta", "experiment.betas=[0.1, 1e39]", f"experiment.seeds=[{SEED}]")
    assert code == 1
    assert "to do" not in again
    assert "arm beta-1e+39, seed 1: " in again
    root = folder / "run" / "experiments" / "beta"
    assert {row["arm"] for row in csv.DictReader((root / "results.csv").open())} == {
        "dpo",
        "beta-0.1",
        "base",
    }
    assert (
        "Not done, and not in these results: beta-1e+39, seed 1 (failed)."
        in (root / "report.html").read_text()
    )


def test_what_one_experiment_trained_another_does_not_train_again(beta, folder):
    arms = folder / "run" / "experiments" / "arms"

    def results():
        return {file: time for file, time in stamps(arms).items() if file.name != "config.yaml"}

    before = results()
    code, out, err = run(folder, "displacement", f"experiment.seeds=[{SEED}]")
    assert code == 0, err
    assert "2 to do" in out  # to score the pairs
    after = results()
    assert before == {file: after[file] for file in before}
    assert {file.relative_to(arms).parts[2] for file in after.keys() - before} == {"rescored"}
    root = folder / "run" / "experiments" / "displacement"
    assert {row["arm"] for row in csv.DictReader((root / "results.csv").open())} == {"dpo", "bdpo", "base"}
    assert {row["arm"] for row in csv.DictReader((root / "displacement.csv").open())} == {"dpo", "bdpo"}


def test_an_experiment_without_arms_needs_scores_alone(finished, folder):
    code, _, err = run(folder, "imbalance")
    assert code == 0, err
    root = folder / "run" / "experiments" / "imbalance"
    assert "Figure 2" in (root / "report.html").read_text()
    assert {row["group"] for row in csv.DictReader((root / "results.csv").open())} == {"safe", "unsafe"}


def test_what_cannot_be_run_is_one_line(finished, folder):
    code, _, err = run(folder, "no-such-thing")
    assert code == 2
    assert "imbalance" in err
    code, _, err = run(folder, "alpha", "experiment.alphas=[1.0]")
    assert code == 2
    assert "experiment.alphas" in err
