"""The page of an experiment, and the table of its arms for the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv

from bdpo.config import Config
from bdpo.evaluation.benchmarks.registry import BENCHMARKS, is_main, measures_safety
from bdpo.evaluation.judges.registry import JudgeNote, judge_note
from bdpo.experiments.arms import arm_folder
from bdpo.experiments.figures import bars, curve, front
from bdpo.experiments.rates import RateTrial
from bdpo.experiments.results import ArmDifference, ArmMeasure, ExperimentResults
from bdpo.reports.cost import cost_section, stage_costs
from bdpo.reports.evaluation import comparison_sentence
from bdpo.reports.page import Page, PageSection, PageTable, Picture
from bdpo.reports.run import (
    data_section,
    mutual_information_section,
    settings_section,
    setup_section,
    training_section,
)
from bdpo.stats import CONFIDENCE_LEVEL, Difference, p_value, percent_of, points_of
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.records import TrainingRecord, training_record
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from rich.table import Table


def csv_bytes(table: pa.Table) -> bytes:
    """A table as CSV."""
    target = io.BytesIO()
    pyarrow.csv.write_csv(table, target)
    return target.getvalue()


def arms_table(measures: Sequence[ArmMeasure], judge: str) -> Table:
    """The main measures of every arm, for the terminal."""
    from rich.table import Table

    rows = main_measures(measures)
    labels = list(dict.fromkeys(row.label for row in rows))
    caption = (
        f"percent ({CONFIDENCE_LEVEL:.0%} interval over clusters of prompts); p: paired test, see the page; "
        f"judged by {judge}"
    )
    table = Table("arm", *labels, caption=caption)
    for arm, cells in _by_arm(rows, labels).items():
        table.add_row(arm, *cells)
    return table


def main_measures(measures: Sequence[ArmMeasure]) -> list[ArmMeasure]:
    """Those of `summarise_arms` that are the main ones of their benchmarks."""
    return [row for row in measures if is_main(row.benchmark, row.measure)]


def experiment_page(config: Config, run: RunDir, results: ExperimentResults) -> Page:
    """The page of an experiment. Sections without results are left out."""
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    for job in results.trained:
        logs.setdefault(job.arm, []).append(MetricsLog(job.run.metrics).read())
    first = training_record(results.trained[0].run) if results.trained else None
    sections: list[PageSection | None] = [setup_section(config, run, first, arms=bool(results.arms))]
    if results.measures is not None:
        rows = main_measures(results.measures)
        sections += [
            _arms_section(config, results),
            _rates_section(config, results.rates) if results.rates else None,
            _results_section(results, rows, judge_note(config)) if rows else None,
            _differences_section(results.differences) if results.differences is not None else None,
            _all_measures_section(results.measures),
        ]
    sections += [section for finding in results.findings for section in finding.sections]
    sections += [
        data_section(run, trained=False),
        mutual_information_section(config, run),
        training_section(logs),
        cost_section(stage_costs(results.stages)),
        settings_section(config),
    ]
    shown = [section for section in sections if section is not None]
    return Page(results.experiment.title, [results.experiment.question, *results.notes], shown)


def _arms_section(config: Config, results: ExperimentResults) -> PageSection:
    keys = list(dict.fromkeys(key for arm in results.arms for key in arm.params))
    folders = {job.arm: job.run for job in results.trained}
    rows = []
    for arm in results.arms:
        trained = training_record(folders[arm.name]) if arm.name in folders else None
        pairs = _pairs(trained) if trained else ""
        steps = str(trained.steps) if trained else ""
        values = (str(arm.params.get(key, "")) for key in keys)
        rows.append((arm.name, *values, arm_folder(config, arm), pairs, steps))
    seeds = ", ".join(map(str, config.experiment.seeds))
    text = [
        f"Each arm is trained with the seeds {seeds}; settings that are not in the table are the same for "
        "all arms. An arm that other experiments of the run have as well is trained once; all their pages "
        "count its cost."
    ]
    if len({row[-1] for row in rows if row[-1]}) > 1:
        text.append("The arms differ in their number of steps: an arm that leaves out pairs has fewer.")
    return PageSection("The arms", text, [PageTable(("arm", *keys, "folder", "pairs", "steps"), rows)])


def _pairs(trained: TrainingRecord) -> str:
    """How many pairs a training had."""
    changed = [
        f"{count:,} {what.replace('_', ' ')}"
        for what, count in trained.safety.items()
        if what != "kept" and count
    ]
    return "; ".join([f"{trained.pairs['trained on']:,} of {trained.pairs['prepared']:,}", *changed])


def _results_section(results: ExperimentResults, rows: Sequence[ArmMeasure], judge: JudgeNote) -> PageSection:
    """The main measures of each arm, as a table, figures and a sentence for each test."""
    labels, reference = list(dict.fromkeys(row.label for row in rows)), results.arms[0].name
    text = [
        comparison_sentence(
            row.label, reference, row.arm, row.compared, judge.reach.get(BENCHMARKS[row.benchmark].rubric)
        )
        for row in rows
        if row.compared is not None
    ]
    tests = len(text)
    if reference not in {row.arm for row in rows}:
        text.append(f"No arm is tested: {reference}, with which all others are compared, has no result.")
    if tests:
        text.append(
            f"Intervals and p are over clusters of prompts, for these seeds; {tests} tests, without a "
            "correction for their number. Where an interval excludes 0 and p is above 0.05, few clusters "
            "differ, and p is the more reliable of the two."
        )
    table = PageTable(
        ("percent", *labels),
        [(arm, *cells) for arm, cells in _by_arm(rows, labels).items()],
        f"Mean over prompts and seeds, 95 % interval over clusters; p of the test against {reference}; "
        f"judged by {judge.label}.",
    )
    return PageSection("Main measures", text, [table], _pictures(results, rows, labels))


def _pictures(results: ExperimentResults, rows: Sequence[ArmMeasure], labels: Sequence[str]) -> list[Picture]:
    up, right = (_first(rows, safety) for safety in (True, False))
    pictures = []
    if results.experiment.axis and up:
        shown = [label for label in (up, right) if label]
        figure = curve(results.experiment.axis, results.arms, rows, shown)
        pictures.append(Picture("curve", figure, "With intervals."))
    caption = "95 % intervals over clusters of prompts; small marks: the lowest and the highest seed."
    pictures.append(Picture("arms", bars(rows, labels), caption))
    if up and right:
        caption = "Both at once: up and to the right is better."
        pictures.append(Picture("front", front(rows, up, right), caption))
    return pictures


def _by_arm(rows: Sequence[ArmMeasure], labels: Sequence[str]) -> dict[str, list[str]]:
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row.arm, [""] * len(labels))[labels.index(row.label)] = _cell(row)
    return cells


def _cell(row: ArmMeasure) -> str:
    return _interval(row) + ("" if row.compared is None else f", p {p_value(row.compared.p)}")


def _interval(row: ArmMeasure) -> str:
    return percent_of(row.value, row.low, row.high)


def _first(rows: Sequence[ArmMeasure], safety: bool) -> str | None:
    """The label of the first measure of safety, or of usefulness."""
    return next((row.label for row in rows if measures_safety(row.benchmark) == safety), None)


def _rates_section(config: Config, rates: Sequence[RateTrial]) -> PageSection:
    """The results of each arm at each learning rate, and which rate it is trained with."""
    tune = config.tune
    rows = [
        (
            row.arm,
            f"{row.learning_rate:g}",
            percent_of(row.objective, row.objective_low, row.objective_high),
            percent_of(row.constraint, row.constraint_low, row.constraint_high),
            *({True: "yes", False: "no", None: ""}[flag] for flag in (row.feasible, row.chosen)),
        )
        for row in rates
    ]
    text = [
        "At the first seed, on prompts that are not those of the results. A rate is feasible if "
        f"{tune.constraint} is at most {100 * tune.max_over_refusal:g} points below the base model's, and at "
        f"most {100 * tune.max_broken:g} points more of the answers are broken. A row without numbers could "
        "not be trained, or not be judged."
    ]
    headings = ("arm", "learning rate", tune.metric, tune.constraint, "feasible", "chosen")
    return PageSection("Learning rates", text, [PageTable(headings, rows, "Percent, 95 % intervals.")])


def _differences_section(differences: Sequence[ArmDifference]) -> PageSection:
    """How every two arms differ."""
    rows = [
        (f"{row.arm} − {row.reference}", row.label, str(row.compared.n), *_difference(row.compared))
        for row in differences
    ]
    text = [
        f"{len(rows)} paired tests over each prompt's mean of the seeds, without a correction for their "
        "number."
    ]
    headings = ("arms", "measure", "n", "difference, points", "p")
    table = PageTable(headings, rows, "95 % intervals over clusters of prompts.")
    return PageSection("Every two arms", text, [table], folded=True)


def _all_measures_section(measures: Sequence[ArmMeasure]) -> PageSection:
    headings = ("arm", "measure", "n", "dropped", "value", "seeds from", "to", "difference", "p")
    rows = [
        (
            row.arm,
            row.label,
            str(row.n),
            str(row.dropped),
            _interval(row),
            f"{100 * row.seed_low:.1f}",
            f"{100 * row.seed_high:.1f}",
            *_difference(row.compared),
        )
        for row in measures
    ]
    table = PageTable(headings, rows, "The same as results.csv.")
    return PageSection("All measures", tables=[table], folded=True)


def _difference(found: Difference | None) -> tuple[str, str]:
    """(`+3.1 (-0.4 to +6.5)`, in points; p); both are empty without a comparison."""
    if found is None:
        return "", ""
    return points_of(found.difference, found.low, found.high), p_value(found.p)
