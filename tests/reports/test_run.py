"""The page of a run, made of a folder alone: what is there is shown, what is private is not."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest

from bdpo.config import parse_config
from bdpo.config.derive import part_of
from bdpo.evaluation.benchmarks.base import Measure
from bdpo.evaluation.benchmarks.registry import BENCHMARKS
from bdpo.evaluation.judges.registry import JudgeNote
from bdpo.evaluation.measures import summarise
from bdpo.experiments.arms import Arm, ExperimentRecord, arm_run, base_run
from bdpo.experiments.definitions import EXPERIMENTS
from bdpo.experiments.displacement import displaced_pairs, displacement_finding
from bdpo.experiments.jobs import Job
from bdpo.experiments.page import csv_bytes, experiment_page
from bdpo.experiments.rates import RateTrial
from bdpo.experiments.results import ArmMeasure, ExperimentResults, arm_differences, arm_table, summarise_arms
from bdpo.method.losses import METHODS
from bdpo.reports.cost import TimedStage
from bdpo.reports.evaluation import comparison_sentence, comparison_sentences, evaluation_section
from bdpo.reports.page import write_page
from bdpo.reports.run import run_page, setup_section, training_section
from bdpo.scoring.scores import SCORE_SCHEMA, score_store
from bdpo.search.sweep import Sweep
from bdpo.search.trials import results_table
from bdpo.stats import Difference, rate
from bdpo.storage.manifests import write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import write_parquet, write_text
from bdpo.storage.records import TrainingRecord
from bdpo.storage.run_dir import RunDir
from bdpo.storage.sealed import sealed
from bdpo.variants.objective import Measured
from pipelines import report
from pipelines.report import timed_stages
from pipelines.runtime.experiment_results import write_results
from tests.support.helpers import tiny_config
from tests.support.score_rows import evaluated, table

FINGERPRINT = {"dtype": "float32", "unconditional": "bos", "max_length": 64, "weights": "0123456789abcdef"}

PAIRS = 200_000

HARM = "plantedharmfultext"

ACCOUNT = {
    "rows": PAIRS + 3, "kept": PAIRS, "quarantined": {"duplicate": 2, "empty": 1}, "excluded": {},
    "not_sampled": 0, "groups": {"safe": 99_900, "none": 100_100}, "format": "pku_saferlhf",
    "unread_columns": ["votes"], "changed_by_template": 7,
}  # fmt: skip


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
    """A finished run, with texts where texts are."""
    return finished_run(tmp_path, scores.slice(0, 2000), 50)


def finished_run(folder, scores, steps):
    """Config and folder of a run that trained so many steps on pairs with these scores."""
    config = tiny_config(folder / "run", folder / "gone", folder / "gone.jsonl")
    run = RunDir(config.run_dir)
    run.open(config).release()
    write_manifest(run.data / "manifest.json", {}, account=ACCOUNT)
    score_store(run, FINGERPRINT).write(0, scores.replace_schema_metadata({"bdpo.work": "{}"}))
    write_manifest(run.scores / "manifest.json", FINGERPRINT, rows=len(scores), seconds=36.0, workers={})
    keys = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
    log = [{"step": step + 1, **dict.fromkeys(keys, step / 1000)} for step in range(steps)]
    write_text(run.metrics, "".join(sealed(row) + "\n" for row in log))
    for name, harm in (("base", 1.0), ("trained", 0.0)):
        items = table([harm, harm, 0.5, harm], [False, False, True])
        write_parquet(run.eval(name) / "scores.parquet", items)
        judge = {"evaluate.judge": "string_matching"}
        write_manifest(run.eval(name) / "summary.json", judge, seconds=1.0, **summarise(items).to_json())
    write_text(run.private / "responses" / "base.txt", HARM)
    write_text(run.pairs / "texts.txt", HARM)
    return config, run


def test_a_run_of_200_000_pairs_is_a_small_page(tmp_path, scores):
    config, folder = finished_run(tmp_path, scores, 5000)
    file = folder.report / "report.html"
    write_page(run_page(config, folder, timed_stages(config, folder)), file)
    html = file.read_text()
    assert file.stat().st_size < 5_000_000
    for shown in (
        "200,003", "quarantined: duplicate", "reward margin", "(pku_saferlhf)", "prepared, no group",
        "Columns not read: votes.", "The chat template changed the text of 7 kept rows.",
        "StrongReject safety", "0123456789abcdef", "GPU-hours", "method.alpha", "base", "trained",
        "These numbers were judged by string_matching, a screen.", "tests below are not corrected",
    ):  # fmt: skip
        assert shown in html
    assert HARM not in html


@pytest.mark.parametrize("name", ["run", "methods"])
def test_a_page_with_all_its_tables_fits_a_phone(run, tab, name):
    config, folder = run
    page = run_page(config, folder, timed_stages(config, folder))
    if name == "methods":
        found = {arm.name: evaluated(table([1.0, 0.5], [False])) for arm in arms_of("methods", config)}
        page = page_of("methods", run, measures=summarise_arms(found, "bdpo"))
    write_page(page, folder.report / "report.html")
    tab.assert_fits_a_phone(folder.report / "report.html")


def arms_of(name, config):
    return EXPERIMENTS[name].arms(config)


def page_of(name, run, trained=(), **results):
    """The page of an experiment with these results."""
    config, folder = run
    found = ExperimentResults(EXPERIMENTS[name], arms_of(name, config), trained, **results)
    return experiment_page(config, folder, found)


def picture(page, name):
    """The axes of a figure of a page."""
    return next(p.figure for section in page.sections for p in section.pictures if p.name == name).axes[0]


def part(page, heading):
    return next(section for section in page.sections if section.heading == heading)


SPACE = {"method.alpha": [0.5, 1.0, 2.0], "method.beta": [0.1, 0.3, 0.5]}  # nine products


CHECKED = "On the held-out prompts the constraint is violated."


@pytest.fixture
def swept(run):
    """The run's folder with a finished sweep of two keys: nine trials, of which the last refuses too much."""
    config, folder = run
    tune = {"space": SPACE, "searcher": "grid", "rungs": [0.5, 1.0]}
    config = parse_config(config.model_dump() | {"tune": tune, "evaluate": {"gpus_per_worker": 0.5}}, "test")
    made_of: dict = {"tune.space": list(SPACE)} | {f"tune.space.{key}": dim for key, dim in SPACE.items()}
    made_of |= {f"tune.{key}": value for key, value in config.tune.model_dump(exclude={"space"}).items()}
    sweep = Sweep(config, folder, made_of)
    sweep.begin()
    for number in range(9):
        trial = sweep.suggest()
        for step in (4, 8):
            safety, complied = rate([i < number for i in range(10)]), rate([number < 8, True])
            sweep.record_rung(trial, step, Measured(safety, complied, 1.0, 0.95 - complied.known), 100.0, 7.0)
    results = results_table(sweep.trials(), config.tune)
    write_parquet(folder.tune / "results.parquet", results)
    best = folder.part("tune", "trials", "0007").eval("trained")
    bases = [folder.search_base(part).eval("base") for part in ("search", "held_out")]
    for place, harm in ((best, 0.0), (bases[0], 1.0), (bases[1], 1.0)):
        items = table([harm] * 4, [False] * 4)
        write_parquet(place / "scores.parquet", items)
        write_manifest(place / "summary.json", {}, seconds=60.0, **summarise(items).to_json())
    write_manifest(
        folder.tune / "summary.json",
        made_of,
        best="0007",
        params={},
        held_out={},
        constraint={"sentence": CHECKED},
    )
    return config, folder


def test_the_page_of_a_sweep_has_its_heat_map_its_front_and_a_line_a_trial(swept):
    config, folder = swept
    write_text(folder.root / "experiments" / "alpha" / "report.html", "a page")
    page = run_page(config, folder, timed_stages(config, folder))
    assert CHECKED in next(section for section in page.sections if section.heading == "Search").text
    space, front = picture(page, "search-space"), picture(page, "search-front")
    assert (space.get_xlabel(), space.get_ylabel()) == ("α", "β")
    written = {text.xy: text.get_text() for text in space.texts}
    everywhere = [(alpha, beta) for alpha in SPACE["method.alpha"] for beta in SPACE["method.beta"]]
    assert written == {at: str(10 * number) for number, at in enumerate(everywhere)}
    assert "compliance" in front.get_xlabel()
    assert "safety" in front.get_ylabel()
    lines = {line.get_label(): line for line in front.lines}
    points = front.containers[0].lines[0].get_xydata().tolist()
    assert points == [pytest.approx([100 if n < 8 else 50, 10 * n]) for n in range(9)]
    assert lines["Pareto front"].get_xydata().tolist() == [pytest.approx([50, 80]), pytest.approx([100, 70])]
    assert lines["base model"].get_xydata().tolist() == [pytest.approx([100, 0])]
    rows = part(page, "Search").tables[0].rows
    assert [row[0] for row in rows] == [f"000{n}" + " (chosen)" * (n == 7) for n in range(9)]
    assert [row[1:3] for row in rows] == [(f"{alpha:g}", f"{beta:g}") for alpha, beta in everywhere]
    assert rows[8][4].startswith("80.0 (")
    assert rows[8][5].startswith("50.0 (")
    assert part(page, "Experiments").text == ["experiments/alpha/report.html"]
    file = folder.report / "report.html"
    write_page(page, file)
    for name in ("search-space", "search-front"):
        assert (folder.report / f"{name}.png").stat().st_size > 5000


def test_a_sweep_counts_in_time_and_cost(swept):
    """Nine trials of two rungs of 100 s of training on no GPU, 7 s of evaluation on half a one."""
    page = run_page(*swept, timed_stages(*swept))
    rows = {row[0]: row[1:] for row in part(page, "Time and cost").tables[0].rows}
    assert rows["search: train 9 trials"] == ("1,800", "0", "0.00")
    assert rows["search: evaluate 9 trials"] == ("126", "0.5", "0.02")
    for name in ("base", "base, held out", "chosen, held out"):
        assert rows[f"search: evaluate {name}"][0] == "60"
    evaluated = 2 * 1.0 + 126 + 3 * 60  # with both models of the run itself
    assert rows["all"][-1] == f"{evaluated * 0.5 / 3600:.2f}"


def test_a_folder_without_results_has_a_page_too(tmp_path):
    config = tiny_config(tmp_path / "run", tmp_path / "gone", tmp_path / "gone.jsonl")
    page = run_page(config, RunDir(config.run_dir), [])
    assert [section.heading for section in page.sections] == ["Setup", "All settings"]


def test_a_comparison_in_words():
    row = Difference(10, first=0.5, second=0.8, difference=0.3, low=0.1, high=0.5, p=0.0004, test="mcnemar")
    assert comparison_sentence("Safety", "dpo", "bdpo", row) == (
        "Safety: bdpo 80.0 %, dpo 50.0 %: +30.0 points (95 % interval +10.0 to +50.0), p <0.001, "
        "more than the choice of prompts explains."
    )
    assert "chance may explain it" in comparison_sentence("Safety", "dpo", "bdpo", replace(row, p=0.4))
    unsure = replace(row, low=-0.1, p=0.04)  # test and interval do not agree
    assert "p 0.04, the interval includes 0: chance may explain it." in comparison_sentence(
        "Safety", "dpo", "bdpo", unsure
    )
    same = replace(row, second=0.5, difference=-1e-17, low=-0.5, high=0.5, p=1.0)
    assert "+0.0 points (95 % interval -50.0 to +50.0), p 1" in comparison_sentence(
        "Safety", "dpo", "bdpo", same
    )


def test_only_verdicts_of_one_judge_are_compared():
    """With the larger of the errors that its two evaluations know."""

    def by(judge, reach):
        [found] = evaluated(table([0.0] * 40))
        return replace(found, fingerprint={"evaluate.judge": judge}, judge=JudgeNote(judge, reach))

    base = by("rubric", {"harm": 0.2})
    same = comparison_sentences({"base": base, "trained": by("rubric", {"harm": 0.1})})
    assert "with the judge's own error" in same[0]
    assert same == comparison_sentences({"base": by("rubric", {"harm": 0.2}), "trained": by("rubric", {})})
    assert comparison_sentences({"base": base, "tampered": by("wildguard", {})}) == [
        "tampered and base are not compared: evaluated with different evaluate.judge."
    ]
    page = evaluation_section({"base": base, "tampered": by("wildguard", {})})
    assert all(judge in page.tables[0].caption for judge in ("judged by rubric", "judged by wildguard"))


@pytest.mark.parametrize("name", ["methods", "alpha", "imbalance"])
def test_the_page_of_an_experiment(run, name):
    config, folder = run
    arms = arms_of(name, config)
    worse, better = table([1.0, 0.5, 1.0], [False] * 4), table([0.0, 0.5, 0.0], [False, True, False, False])
    scores = {arm.name: evaluated(*[worse if arm.name == "dpo" else better] * 2) for arm in arms}
    reference = arms[0].name if arms else ""
    measures = summarise_arms(scores | {"base": evaluated(worse)}, reference) if arms else None
    log = {"step": 1, "loss": 1, "rewards/margins": 0, "rewards/accuracies": 1, "logps/chosen": 0}
    done = [Job(arm.name, 0, *arm_run(config, folder, arm, 0)) for arm in arms[1:]]
    for job in done:
        MetricsLog(job.run.metrics).append(log)
        pairs, safety = {"prepared": PAIRS, "trained on": PAIRS - 1}, {"kept": 9, "dropped": 3}
        record = TrainingRecord(steps=7, seconds=3600.0, pairs=pairs, safety=safety)
        write_manifest(job.run.train / "manifest.json", {}, **asdict(record))
    notes = ["Not done is this and that."]
    stages = [TimedStage("score", folder.scores / "manifest.json", 2.0)]
    stages += [TimedStage(f"{job.arm}: train", job.run.train / "manifest.json", 1.0) for job in done]
    page = page_of(name, run, done, notes=notes, measures=measures, stages=stages)
    write_page(page, folder.root / "experiments" / name / "report.html")
    html = (folder.root / "experiments" / name / "report.html").read_text()
    for arm in arms:
        assert arm.name in html
    if measures is not None:
        assert csv_bytes(arm_table(ArmMeasure, measures)).decode().count("\n") == len(measures) + 1
        assert (folder.root / "experiments" / name / "the-arms.csv").is_file()
        assert "199,999 of 200,000; 3 dropped" in html
        assert "without a correction" in html
    for shown in (notes[0], "Time and cost", "All settings", "200,003", "better understood in", "0.02"):
        assert shown in html
    assert HARM not in html


def curves(**seeds):
    """Of each arm a log a seed: steps of a loss, the other metrics made of it."""
    return {
        arm: [
            [
                {"step": n + 1, "loss": loss, "rewards/margins": -loss, "rewards/accuracies": loss / 9}
                | {"logps/chosen": -10 * loss}
                for n, loss in enumerate(log)
            ]
            for log in logs
        ]
        for arm, logs in seeds.items()
    }


def test_training_curves_are_means_over_seeds_from_the_first_step_to_the_last():
    trained = training_section(curves(dpo=[[5, 4, 3], [3, 1, 0]], bdpo=[[9, 7, 2]]))
    figures = {picture.name: picture.figure.axes[0] for picture in trained.pictures}
    for key, scale in (("loss", 1), ("rewards-margins", -1), ("logps-chosen", -10)):
        axes = figures[f"curve-{key}"]
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines == {
            "dpo": [[1, 4 * scale], [2, 2.5 * scale], [3, 1.5 * scale]],
            "bdpo": [[1, 9 * scale], [2, 7 * scale], [3, 2 * scale]],
        }
        [band] = axes.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert corners == {(n + 1, scale * v) for log in ([5, 4, 3], [3, 1, 0]) for n, v in enumerate(log)}
        assert axes.get_xlabel() == "step"
    assert figures["curve-loss"].get_ylabel() == "loss"
    assert figures["curve-rewards-margins"].get_ylabel() == "reward margin"


def test_a_training_without_rewards_has_no_curve_of_them():
    log = [{"step": n + 1, "loss": 2.0 - n, "logps/chosen": -9.0 + n} for n in range(2)]
    alone = training_section({"": [log]})
    assert [picture.name for picture in alone.pictures] == ["curve-loss", "curve-logps-chosen"]
    assert alone.tables[0].rows == [("last step", "2", "1.000", "", "", "-8.000")]
    beside = training_section({"sft": [log]} | curves(dpo=[[5, 4]]))
    figures = {picture.name: picture.figure.axes[0] for picture in beside.pictures}
    assert [len(figures[f"curve-{key}"].lines) for key in ("loss", "rewards-margins")] == [2, 1]


def outcome(config, folder, name, harms, refused):
    """(page, results by arm and measure) of an experiment, its arms at two seeds as given."""
    arms = [*(arm.name for arm in arms_of(name, config)), "base"]
    found = {
        arm: evaluated(table(h, r), table([*h[:-1], 0.0], r))
        for arm, h, r in zip(arms, harms, refused, strict=True)
    }
    results = summarise_arms(found, arms[0])
    differences = arm_differences(found)
    page = page_of(name, (config, folder), measures=results, differences=differences)
    return page, {(row.arm, row.measure): asdict(row) for row in results}


def shares(arms):
    """Of each of so many arms harms and refusals of four prompts, all different and far from a half."""
    return [[1.0] * (n % 4) + [0.1 * n] * (4 - n % 4) for n in range(arms)], [
        [i < n % 3 for i in range(8)] for n in range(arms)
    ]


def drawn(container):
    """What an errorbar has: (x, y) of its points, and each bar's two ends."""
    points, _, bars = container.lines
    return points.get_xydata().tolist(), [segment.tolist() for segment in bars[0].get_segments()]


def test_the_bars_of_an_experiment_are_its_results_in_percent(run):
    page, results = outcome(*run, "methods", *shares(6))
    axes = picture(page, "arms")
    arms = [label.get_text() for label in axes.get_yticklabels()]
    assert arms == ["bdpo", "dpo", "cpo", "simpo", "safedpo", "base"]
    assert axes.yaxis_inverted()
    for container, measure in zip(axes.containers, ("safety", "compliance"), strict=True):
        points, bars = drawn(container)
        assert measure in container.get_label()
        for number, (arm, (x, y), bar) in enumerate(zip(arms, points, bars, strict=True)):
            row = results[arm, measure]
            assert x == pytest.approx(100 * row["value"])
            assert abs(y - number) < 0.4
            assert [end[0] for end in bar] == pytest.approx([100 * row["low"], 100 * row["high"]])
    seeds = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "|"]
    for number, arm in enumerate(arms):
        row = results[arm, "safety"]
        assert [100 * row["seed_low"], 100 * row["seed_high"]] in [pytest.approx(s) for s in seeds], number


def test_the_front_has_safety_over_compliance(run):
    page, results = outcome(*run, "methods", *shares(6))
    axes = picture(page, "front")
    assert axes.get_xlabel() == "XSTest compliance, safe (percent)"
    assert axes.get_ylabel() == "StrongReject safety (percent)"
    at = {line.get_label(): line for line in axes.lines}
    assert len(at) == len({(line.get_marker(), line.get_color()) for line in at.values()}) == 6
    for arm, line in at.items():
        values = [100 * results[arm, measure]["value"] for measure in ("compliance", "safety")]
        assert line.get_xydata()[0].tolist() == pytest.approx(values)


def test_safety_and_usefulness_are_told_apart_by_what_the_judge_is_asked(run, monkeypatch):
    """Not by the names of measures, which are each benchmark's own."""
    for name, measure, value in (
        ("strongreject", "resistance", lambda row: 1 - row["harm"]),
        ("xstest", "helpfulness", lambda row: float(not row["refused"])),
    ):
        own = (Measure(measure, measure, value, main=True, compared=True),)
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], judged=own))
    page, _ = outcome(*run, "alpha", *shares(len(run[0].experiment.alphas) + 2))
    axes = picture(page, "front")
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "XSTest helpfulness (percent)",
        "StrongReject resistance (percent)",
    )
    assert len(picture(page, "curve").containers) == 2


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_curve_is_a_point_for_each_value_with_its_interval(run, name):
    config, folder = run
    values = getattr(config.experiment, f"{name}s")
    page, results = outcome(config, folder, name, *shares(len(values) + 2))
    axes = picture(page, "curve")
    assert axes.get_xlabel() == f"method.{name}"
    for container, measure in zip(axes.containers, ("safety", "compliance"), strict=True):
        points, bars = drawn(container)
        rows = [results[f"{name}-{value}", measure] for value in values]
        assert points == [pytest.approx([x, 100 * row["value"]]) for x, row in zip(values, rows, strict=True)]
        assert [[end[1] for end in bar] for bar in bars] == [
            pytest.approx([100 * row["low"], 100 * row["high"]]) for row in rows
        ]
        levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines if line.get_label()[0] != "_"}
        for arm in ("dpo", "base"):
            label = next(name for name in levels if measure in name and name.endswith(f", {arm}"))
            assert levels[label] == pytest.approx(100 * results[arm, measure]["value"])


def test_every_two_arms_are_on_the_page_folded(run):
    page, _ = outcome(*run, "displacement", [[1.0] * 6, [0.0] * 6, [0.5] * 6], [[True], [False], [False]])
    every = part(page, "Every two arms")
    assert every.folded
    shown = {(row[0], row[1]): row[3] for row in every.tables[0].rows}
    assert len(shown) == 6
    # of six prompts one is harmless at the second seed, whatever the arm
    assert shown["bdpo − dpo", "StrongReject safety"].startswith(f"{100 * 5.5 / 6:+.1f} (")
    assert shown["base − bdpo", "StrongReject safety"].startswith(f"{-50 * 5.5 / 6:+.1f} (")
    assert shown["base − dpo", "XSTest compliance, safe"].startswith("+100.0")


def test_the_change_of_the_responses_is_on_the_page(run, scores):
    n = 2000
    rng = np.random.default_rng(0)
    before = scores.slice(0, n)
    change, ches = np.where(np.arange(n) % 10 < 3, -1.0, 2.0), rng.permutation(n)
    for name, values in (("ches", ches), ("ref_chosen_logps", np.zeros(n))):
        at = before.schema.get_field_index(name)
        before = before.set_column(at, before.schema.field(at), pa.array(values.astype(np.float32)))
    after = before
    for name, values in (("ref_chosen_logps", change), ("ref_rejected_logps", -6 - ches / n)):
        at = before.schema.get_field_index(name)
        after = after.set_column(at, before.schema.field(at), pa.array(values.astype(np.float32)))
    results = summarise_arms({"dpo": evaluated(table([1.0, 0.5]))}, "dpo")
    finding = displacement_finding({"dpo": displaced_pairs(before, [after])})
    page = page_of("displacement", run, measures=results, findings=[finding])
    row = part(page, "Change of log π(y_w | x)").tables[0].rows[0]
    assert row[:2] == ("dpo, all", "2,000")
    assert row[2].startswith("30.0 (")
    assert row[3].startswith("+1.10 (+1.0")
    assert row[4].startswith("-7.50 (-7.5")  # from the 1 that they were before
    order = np.argsort(ches)
    for cell, tenth in zip(row[5:7], (order[:200], order[-200:]), strict=True):
        assert cell.startswith(f"{change[tenth].mean():+.2f} (")
    told = part(page, "Correlation with the reference model")
    assert told.tables[0].rows[0][1].count("to") == 1
    assert {picture.name for picture in told.pictures} >= {"displacement-ches", "displacement-imbalance"}


def test_learning_rates_that_were_tried_are_on_the_page(run):
    config, _ = run
    rates = [
        RateTrial("dpo", 1e-5, 0.5, 0.4, 0.6, 0.9, 0.8, 1.0, least=0.8, feasible=True, chosen=True),
        RateTrial("dpo", 1.0),
    ]
    results = summarise_arms({"dpo": evaluated(table([1.0, 0.5]))}, "dpo")
    page = page_of("displacement", run, measures=results, rates=rates)
    grid = part(page, "Learning rates").tables[0]
    assert all(grid.headings)
    assert grid.headings[2:4] == (config.tune.metric, config.tune.constraint)
    assert grid.rows == [
        ("dpo", "1e-05", "50.0 (40.0–60.0)", "90.0 (80.0–100.0)", "yes", "yes"),
        ("dpo", "1", "", "", "", "no"),
    ]


def test_the_tables_of_an_experiment_that_searched_its_learning_rates(run):
    """On disk: DPO at two rates, of which the second refuses too much, and B-DPO at one."""
    config, folder = run
    held_out = parse_config(config.model_dump() | {"evaluate": {"part": "held_out"}}, "test")
    search = part_of(config, "search")
    plain = arms_of("displacement", config)
    trials = [
        Arm(f"{a.name}-{r}", a.params | {"train.learning_rate": r}) for a in plain for r in (1e-5, 1e-4)
    ]
    arms = tuple(Arm(arm.name, arm.params | {"train.learning_rate": 1e-5}) for arm in plain)

    def done(own, name, items):
        write_text(own.model / "config.json", "{}")
        write_parquet(own.eval(name) / "scores.parquet", items)
        write_manifest(own.eval(name) / "summary.json", {}, seconds=1.0, **summarise(items).to_json())

    shown = [([1.0, 0.0], [False] * 2), ([0.0, 0.0], [False, True]), ([1.0, 0.5], [False] * 2)]
    for trial, (harms, refused) in zip(trials[:3], shown, strict=True):  # the last is not done
        done(arm_run(search, folder, trial, 0)[1], "trained", table(harms, refused))
    done(base_run(search, folder), "base", table([1.0, 1.0], [False] * 2))
    for arm, harm in zip(arms, (1.0, 0.0), strict=True):
        for seed in config.experiment.seeds:
            done(arm_run(held_out, folder, arm, seed)[1], "trained", table([harm] * 4))
    done(base_run(held_out, folder), "base", table([0.5] * 4))
    own = folder.part("experiments", "displacement").root
    ExperimentRecord(held_out, arms, tuple(trials)).write(own)
    write_results(folder, "displacement")

    def read(name):
        return list(csv.DictReader((own / name).open()))

    assert [
        (row["arm"], float(row["learning_rate"]), row["objective"], row["constraint"], row["feasible"])
        for row in read("rates.csv")
    ] == [
        ("dpo", 1e-5, "0.5", "1", "true"),
        ("dpo", 1e-4, "1", "0.5", "false"),
        ("bdpo", 1e-5, "0.25", "1", "true"),
        ("bdpo", 1e-4, "", "", ""),
    ]
    assert [row["chosen"] for row in read("rates.csv")] == ["true", "false"] * 2
    assert {float(row["least"]) for row in read("rates.csv") if row["least"]} == {0.95}
    differences = [
        (row["reference"], row["arm"], float(row["difference"])) for row in read("differences.csv")
    ]
    assert differences == [("dpo", "bdpo", 1.0), ("dpo", "base", 0.5), ("bdpo", "base", -0.5)]
    assert "Learning rates" in (own / "report.html").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_its_own_keys(tmp_path, name):
    config = tiny_config(tmp_path / "run", tmp_path, tmp_path, method={"name": name})
    rows = dict(setup_section(config, RunDir(tmp_path / "run"), None).tables[0].rows)
    shown, _, how = rows["method"].partition(": ")
    assert shown == name
    assert {words.split()[0] for words in how.split(", ") if words} == METHODS[name].model_fields.keys() - {
        "name"
    }


def test_a_training_of_so_many_steps_is_not_shown_by_its_epochs(tmp_path):
    for train, said in (({"max_steps": 7}, "steps: 7,"), ({"num_train_epochs": 2}, "epochs: 2,")):
        config = tiny_config(tmp_path / "run", tmp_path, tmp_path, train=train)
        rows = dict(setup_section(config, RunDir(tmp_path / "run"), None).tables[0].rows)
        assert rows["training"].startswith(said)


def test_the_page_of_an_experiment_without_its_reference_says_so(run):
    results = summarise_arms({"dpo": evaluated(table([1.0])), "base": evaluated(table([1.0]))}, "bdpo")
    page = page_of("methods", run, measures=results)
    names = {section.heading.lower() for section in page.sections}  # of the CSV files beside the page
    assert not names & {"results", "differences", "rates"}  # which are those of the complete tables
    assert part(page, "Main measures").text == [
        "No arm is tested: bdpo, with which all others are compared, has no result."
    ]


def test_a_model_is_shown_with_the_config_that_it_was_trained_with(run):
    config, folder = run
    trained = config.model_copy(update={"method": METHODS["ipo"](), "run_dir": "before it was moved"})
    record = TrainingRecord(1, 2.0, config=trained.model_dump(), versions={"ray": "9.9"})
    write_manifest(folder.train / "manifest.json", {}, **asdict(record))
    page = run_page(config, folder, timed_stages(config, folder))
    assert page.title.startswith("ipo on")
    assert page.lead[0].startswith(f"Run folder {folder.root}, seed ")
    write_page(page, folder.report / "report.html")
    assert "ray 9.9" in (folder.report / "report.html").read_text()


@pytest.mark.parametrize("name", ["first", "methods"])
def test_a_run_in_a_folder_called_experiments_is_a_run(tmp_path, name, monkeypatch):
    """Even one beside a config.yaml, or with the name of an experiment."""
    config = tiny_config(tmp_path / "experiments" / name, tmp_path / "gone", tmp_path / "gone.jsonl")
    run = RunDir(config.run_dir)
    run.open(config).release()
    write_manifest(run.data / "manifest.json", {}, account=ACCOUNT)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", f"experiments/{name}"])
    report.main()
    assert "200,003" in (run.report / "report.html").read_text()


def test_an_experiment_is_known_by_its_record(run, monkeypatch):
    config, folder = run
    own = folder.part("experiments", "imbalance").root
    ExperimentRecord(config, ()).write(own)
    monkeypatch.setattr(sys, "argv", ["report", str(own)])
    report.main()
    assert "Figure 2" in (own / "report.html").read_text()


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
