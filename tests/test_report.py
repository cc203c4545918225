"""The page of a run, made of a folder alone: what is there is shown, what is private is not."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from helpers import tiny_config
from test_experiments import evaluated, table
from test_page import assert_fits_a_phone

from bdpo.evaluation.summary import summarise
from bdpo.experiment_report import csv_bytes, experiment_page
from bdpo.experiments import arm_run, experiment, summarise_arms
from bdpo.page import write_page
from bdpo.report import run_page, sentence, train_stage
from bdpo.runs import RunDir, write_manifest
from bdpo.scoring import SCORE_SCHEMA, score_store
from bdpo.storage import write_parquet, write_text
from pipelines import report

FINGERPRINT = {"dtype": "float32", "unconditional": "bos", "max_length": 64, "weights": "0123456789abcdef"}
PAIRS = 200_000
HARM = "plantedharmfultext"


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    numbers = {name: rng.normal(0.2, 0.1, PAIRS).astype(np.float32) for name in ("mi_chosen", "mi_rejected")}
    columns = {name: np.ones(PAIRS) for name in SCORE_SCHEMA.names} | numbers
    columns |= {
        "pair_id": [str(i) for i in range(PAIRS)],
        "group": rng.choice(["safe", "unsafe"], PAIRS).tolist(),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCORE_SCHEMA]
    return pa.table(arrays, schema=SCORE_SCHEMA)


@pytest.fixture
def run(tmp_path, scores):
    """A finished run of many pairs, with texts where texts are."""
    config = tiny_config(tmp_path / "run", tmp_path / "gone", tmp_path / "gone.jsonl")
    run = RunDir(config.run_dir)
    run.open(config).release()
    account = {
        "rows": PAIRS + 3, "kept": PAIRS, "quarantined": {"duplicate": 2, "empty": 1}, "excluded": {},
        "not_sampled": 0, "groups": {"safe": 99_900, "unsafe": 100_100},
    }  # fmt: skip
    write_manifest(run.data / "manifest.json", {}, account=account)
    score_store(run, FINGERPRINT).write(0, scores.replace_schema_metadata({"bdpo.work": "{}"}))
    write_manifest(run.scores / "manifest.json", FINGERPRINT, rows=PAIRS, seconds=36.0, workers={})
    keys = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
    steps = [{"step": step + 1, **dict.fromkeys(keys, step / 1000)} for step in range(5000)]
    write_text(run.metrics, "".join(json.dumps(step) + "\n" for step in steps))
    for name, harm in (("base", 1.0), ("trained", 0.0)):
        items = table([harm, harm, 0.5, harm], [False, False, True])
        write_parquet(run.eval(name) / "scores.parquet", items)
        write_manifest(run.eval(name) / "summary.json", {}, seconds=1.0, **summarise(items))
    write_text(run.private / "responses" / "base.txt", HARM)
    write_text(run.pairs / "texts.txt", HARM)
    return config, run


def test_a_run_of_200_000_pairs_is_a_small_page(run):
    config, folder = run
    file = folder.report / "report.html"
    write_page(run_page(config, folder), file)
    html = file.read_text()
    assert file.stat().st_size < 5_000_000
    for shown in (
        "200,003", "quarantined: duplicate", "reward margin", "StrongReject safety",
        "0123456789abcdef", "GPU-hours", "method.alpha", "base", "trained",
    ):  # fmt: skip
        assert shown in html
    assert HARM not in html


@pytest.mark.parametrize("name", ["run", "methods"])
def test_a_page_with_all_its_tables_fits_a_phone(run, name):
    config, folder = run
    page = run_page(config, folder)
    if name == "methods":
        plan = experiment("methods", config)
        found = {arm.name: evaluated(table([1.0, 0.5], [False])) for arm in plan.arms}
        page = experiment_page(config, folder, plan, summarise_arms(found, "bdpo"), [])
    write_page(page, folder.report / "report.html")
    assert_fits_a_phone(folder.report / "report.html")


def test_a_folder_without_results_has_a_page_too(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path / "gone", tmp_path / "gone.jsonl")
    page = run_page(config, RunDir(config.run_dir))
    assert [part.heading for part in page.parts] == ["What was run", "All settings"]


def test_a_comparison_in_words():
    row = {"n": 10, "first": 0.5, "second": 0.8, "difference": 0.3, "low": 0.1, "high": 0.5, "p": 0.0004}
    assert sentence("Safety", "dpo", "bdpo", row) == (
        "Safety: bdpo 80.0 %, dpo 50.0 %: +30.0 points (95 % interval +10.0 to +50.0), p <0.001, "
        "more than the choice of prompts explains."
    )
    assert "chance may explain it" in sentence("Safety", "dpo", "bdpo", row | {"p": 0.4})
    same = row | {"second": 0.5, "difference": -1e-17, "low": -0.5, "high": 0.5, "p": 1.0}
    assert "+0.0 points (95 % interval -50.0 to +50.0), p 1" in sentence("Safety", "dpo", "bdpo", same)


@pytest.mark.parametrize("name", ["methods", "alpha", "imbalance"])
def test_the_page_of_an_experiment(run, name):
    config, folder = run
    plan = experiment(name, config)
    worse, better = table([1.0, 0.5, 1.0], [False] * 4), table([0.0, 0.5, 0.0], [False, True, False, False])
    scores = {arm.name: evaluated(*[worse if arm.name == "dpo" else better] * 2) for arm in plan.arms}
    reference = plan.arms[0].name if plan.arms else ""
    results = summarise_arms(scores | {"base": evaluated(worse)}, reference) if plan.arms else None
    log = {"step": 1, "loss": 1, "rewards/margins": 0, "rewards/accuracies": 1, "logps/chosen": 0}
    done = []
    for arm in plan.arms[1:]:
        settings, own = arm_run(config, folder, arm, 0)
        write_text(own.metrics, json.dumps(log) + "\n")
        pairs = {"prepared": PAIRS, "trained on": PAIRS - 1}
        write_manifest(
            own.train / "manifest.json",
            {},
            seconds=3600.0,
            pairs=pairs,
            steps=7,
            safety={"kept": 9, "dropped": 3},
        )
        done.append((arm.name, settings, own))
    notes = ["Not done is this and that."]
    stages = [("score", folder.scores / "manifest.json", 2.0)]
    stages += [train_stage(settings, own, f"{arm}: train") for arm, settings, own in done]
    page = experiment_page(config, folder, plan, results, done, notes, stages=stages)
    write_page(page, folder.root / "experiments" / name / "report.html")
    html = (folder.root / "experiments" / name / "report.html").read_text()
    for arm in plan.arms:
        assert arm.name in html
    if results is not None:
        assert csv_bytes(results).decode().count("\n") == results.num_rows + 1
        assert (folder.root / "experiments" / name / "the-arms.csv").is_file()
        assert "199,999 of 200,000; 3 dropped" in html
        assert "without a correction" in html
    for shown in (notes[0], "Time and cost", "All settings", "200,003", "better understood in", "0.02"):
        assert shown in html
    assert HARM not in html


def test_the_page_of_an_experiment_without_its_reference_says_so(run):
    config, folder = run
    plan = experiment("methods", config)
    results = summarise_arms({"dpo": evaluated(table([1.0])), "base": evaluated(table([1.0]))}, "bdpo")
    page = experiment_page(config, folder, plan, results, [])
    said = next(part for part in page.parts if part.heading == "What came of it").text
    assert said == ["Nothing is tested: there is no bdpo, which all others are compared with."]


def test_a_model_is_shown_with_the_config_that_it_was_trained_with(run):
    config, folder = run
    trained = config.model_copy(update={"method": config.method.model_copy(update={"name": "ipo"})})
    write_manifest(folder.train / "manifest.json", {}, config=trained.model_dump(), versions={"ray": "9.9"})
    page = run_page(config, folder)
    assert page.title.startswith("ipo on")
    write_page(page, folder.report / "report.html")
    assert "ray 9.9" in (folder.report / "report.html").read_text()


def test_the_command_writes_the_page_of_a_run_folder_and_of_nothing_else(run, tmp_path, monkeypatch, capsys):
    _, folder = run
    monkeypatch.setattr(sys, "argv", ["report", str(folder.root)])
    report.main()
    assert (folder.report / "report.html").is_file()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 2
    assert "no run folder" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
