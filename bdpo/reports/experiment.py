"""What an experiment shows: a table for the terminal, figures, and the page with all of it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from bdpo.config import Config
from bdpo.evaluation.benchmarks.registry import is_main, measure_label
from bdpo.evaluation.tables import percent_of
from bdpo.experiments.arms import arm_folder
from bdpo.experiments.definitions import Experiment
from bdpo.experiments.displacement import SIGNS, _tenths, displacement
from bdpo.experiments.results import BASE
from bdpo.reports.cost import TimedStage, cost_section, stage_costs
from bdpo.reports.page import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    Page,
    PageTable,
    Picture,
    Section,
    legend_below,
    plain_axes,
)
from bdpo.reports.run import (
    comparison_sentence,
    data_section,
    mutual_information_section,
    settings_section,
    setup_section,
    training_section,
)
from bdpo.stats import CONFIDENCE_LEVEL, ENDS, Difference, mean_of_many, p_value
from bdpo.storage.manifests import read_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def displacement_figure(arms: Mapping[str, pa.Table], sign: str) -> Figure:
    """The mean change of log π(y_w | x) in each tenth of the pairs by a sign, a line an arm."""
    figure, axes = plain_axes(4.6, 3.4)
    for number, (arm, pairs) in enumerate(arms.items()):
        tenths = [mean_of_many(changes) for changes in _tenths(pairs, sign)]
        values, lows, highs = (np.array([getattr(tenth, end) for tenth in tenths]) for end in ENDS.values())
        errors = [values - lows, highs - values]
        colour = COLOURS[number % len(COLOURS)]
        at = np.arange(1, len(values) + 1)
        axes.errorbar(at, values, errors, c=colour, marker="o", ms=4, capsize=2, label=arm)
    axes.axhline(0, c=GREY, lw=0.8, ls=":")
    axes.set(xlabel=f"tenths of the pairs by {SIGNS[sign]}", ylabel="change of log π(y_w | x), nats")
    legend_below(axes)
    return figure


Row = dict[str, Any]

_MARKS = "os^DvP*"


def csv_bytes(table: pa.Table) -> bytes:
    """A table as CSV."""
    target = io.BytesIO()
    pyarrow.csv.write_csv(table, target)
    return target.getvalue()


def main_rows(results: pa.Table) -> list[Row]:
    """Rows of the results whose measure stands for its benchmark."""
    return [row for row in results.to_pylist() if is_main(row["benchmark"], row["measure"])]


def arms_table(results: pa.Table) -> Table:
    """The main measures of every arm, for the terminal."""
    from rich.table import Table

    rows = main_rows(results)
    measures = list(dict.fromkeys(measure_name(row) for row in rows))
    caption = (
        f"percent ({CONFIDENCE_LEVEL:.0%} interval over clusters of prompts); p: paired test, see the page"
    )
    table = Table("arm", *measures, caption=caption)
    for arm, cells in _by_arm(rows, measures).items():
        table.add_row(arm, *cells)
    return table


def _by_arm(rows: Sequence[Row], measures: Sequence[str]) -> dict[str, list[str]]:
    cells: dict[str, list[str]] = {}
    for row in rows:
        place = cells.setdefault(row["arm"], [""] * len(measures))
        place[measures.index(measure_name(row))] = _cell(row)
    return cells


def _cell(row: Row) -> str:
    return percent_of(row["value"], row["low"], row["high"]) + (
        "" if row["p"] is None else f", p {p_value(row['p'])}"
    )


def experiment_page(
    config: Config,
    run: RunDir,
    plan: Experiment,
    results: pa.Table | None,
    done: Sequence[tuple[str, Config, RunDir]],
    notes: Sequence[str] = (),
    displaced: Mapping[str, pa.Table] | None = None,
    stages: Sequence[TimedStage] = (),
    differences: pa.Table | None = None,
    rates: pa.Table | None = None,
) -> Page:
    """The page of an experiment; `done` are trainings, `results` is None where there are none.

    `notes` come first, `displaced` are the `displaced_pairs` of each arm where the experiment asks for them,
    `stages` is all that it did, `differences` are the `arm_differences`, `rates` what the search for learning
    rates showed of each arm at each of them.
    """
    logs: dict[str, list[list[Row]]] = {}
    for arm, _, folder in done:
        logs.setdefault(arm, []).append(MetricsLog(folder.metrics).read())
    trained = read_manifest(done[0][2].train / "manifest.json") if done else None
    parts: list[Section | None] = [setup_section(config, run, trained, arms=bool(plan.arms))]
    if results is not None:
        parts.append(_arms(config, plan, done))
        parts.append(_rates(config, rates) if rates is not None else None)
        parts.append(_findings(plan, results))
        parts.append(_differences(differences) if differences is not None else None)
        parts.append(_all_measures(results))
    if displaced:
        rows = [(arm, row) for arm, pairs in displaced.items() for row in displacement(pairs)]
        parts += [_displacement(rows), _signs(rows, displaced)]
    parts += [
        data_section(run, trained=False),
        mutual_information_section(config, run),
        training_section(logs),
        cost_section(stage_costs(stages)),
        settings_section(config),
    ]
    return Page(plan.title, [plan.question, *notes], [part for part in parts if part is not None])


def _arms(config: Config, plan: Experiment, done: Sequence[tuple[str, Config, RunDir]]) -> Section:
    keys = list(dict.fromkeys(key for arm in plan.arms for key in arm.params))
    folders = {arm: folder for arm, _, folder in done}
    rows = []
    for arm in plan.arms:
        trained = read_manifest(folders[arm.name].train / "manifest.json") if arm.name in folders else None
        pairs = _pairs(trained) if trained else ""
        steps = str(trained["steps"]) if trained else ""
        values = (str(arm.params.get(key, "")) for key in keys)
        rows.append((arm.name, *values, arm_folder(config, arm), pairs, steps))
    seeds = ", ".join(map(str, config.experiment.seeds))
    text = [
        f"Each arm is trained with the seeds {seeds}; what the table does not name is in the settings. An "
        "arm that other experiments of the run have as well is trained once; its cost is on all their pages."
    ]
    if len({row[-1] for row in rows if row[-1]}) > 1:
        text.append("The arms have not the same number of steps: one that left out pairs has fewer.")
    return Section("The arms", text, [PageTable(("arm", *keys, "folder", "pairs", "steps"), rows)])


def _pairs(trained: Mapping[str, Any]) -> str:
    """How many pairs a training had, from its manifest."""
    safety = trained.get("safety") or {}
    changed = [
        f"{count:,} {what.replace('_', ' ')}" for what, count in safety.items() if what != "kept" and count
    ]
    return "; ".join([f"{trained['pairs']['trained on']:,} of {trained['pairs']['prepared']:,}", *changed])


def _findings(plan: Experiment, results: pa.Table) -> Section | None:
    rows = main_rows(results)
    if not rows:
        return None
    measures = list(dict.fromkeys(measure_name(row) for row in rows))
    reference = plan.arms[0].name
    up, right = (_first(rows, kind) for kind in (("safety",), ("compliance", "correct", "accuracy")))
    pictures = []
    if plan.axis and up:
        pictures.append(
            Picture("curve", _curve(plan, rows, [m for m in (up, right) if m]), "With intervals.")
        )
    caption = "95 % intervals over clusters of prompts; small marks: the lowest and the highest seed."
    pictures.append(Picture("arms", _bars(rows, measures), caption))
    if up and right:
        caption = "Both at once: up and to the right is better."
        pictures.append(Picture("front", _front(rows, up, right), caption))
    tested = [row for row in rows if row["p"] is not None]
    said = [comparison_sentence(measure_name(row), reference, row["arm"], _compared(row)) for row in tested]
    if reference not in {row["arm"] for row in rows}:
        said.append(f"Nothing is tested: there is no {reference}, which all others are compared with.")
    if tested:
        said.append(
            f"Intervals and p are over clusters of prompts, for these seeds; {len(tested)} tests, without a "
            "correction for their number. Where an interval leaves out 0 and p is above 0.05, few clusters "
            "differ: p is the one to go by."
        )
    grid = PageTable(
        ("percent", *measures),
        [(arm, *cells) for arm, cells in _by_arm(rows, measures).items()],
        f"Mean over prompts and seeds, 95 % interval over clusters; p of the test against {reference}.",
    )
    return Section("What came of it", said, [grid], pictures)


def measure_name(row: Row) -> str:
    """`StrongReject safety`, of a row with `benchmark` and `measure`."""
    return measure_label(row["benchmark"], row["measure"])


def _first(rows: Sequence[Row], measures: Sequence[str]) -> str | None:
    """The name of the first measure of a kind."""
    return next((measure_name(row) for row in rows if row["measure"].partition(",")[0] in measures), None)


def _compared(row: Row) -> Difference:
    """The difference that a row of the results holds."""
    numbers = {name: row[name] for name in ("first", "second", "difference", "p")}
    return Difference(
        n=row["paired_n"], low=row["difference_low"], high=row["difference_high"], test="", **numbers
    )


def _rates(config: Config, rates: pa.Table) -> Section:
    """What each arm showed at each learning rate, and which it is trained with."""
    tune = config.tune
    rows = [
        (
            row["arm"],
            f"{row['learning_rate']:g}",
            *(_bounded(row, name) for name in ("objective", "constraint")),
            *({True: "yes", False: "no", None: ""}[row[name]] for name in ("feasible", "chosen")),
        )
        for row in rates.to_pylist()
    ]
    text = [
        "At the first seed, on prompts that the results are not of. A rate is feasible if "
        f"{tune.constraint} is no more than {100 * tune.max_over_refusal:g} points below the base model's. A "
        "line without numbers: it could not be trained, or not be judged."
    ]
    headings = ("arm", "learning rate", tune.metric, tune.constraint, "feasible", "chosen")
    return Section("Learning rates", text, [PageTable(headings, rows, "Percent, 95 % intervals.")])


def _bounded(row: Row, name: str) -> str:
    return percent_of(*(row[f"{name}{end}"] for end in ENDS))


def _displacement(displaced: Sequence[tuple[str, Row]]) -> Section:
    """How many preferred responses fell, by how much, and the rejected ones."""
    text = [
        "log π of both responses of every prepared pair under the trained model, less what it was under the "
        "reference model; mean of the seeds. Lowest and highest CHES: of y_w, in that tenth of the pairs."
    ]
    numbers = {
        "change": "y_w, nats",
        "change_rejected": "y_l, nats",
        "lowest_ches": "lowest CHES",
        "highest_ches": "highest CHES",
    }
    rows = [
        (
            f"{arm}, {row['group']}",
            f"{row['pairs']:,}",
            _number(row, "fell", 100, ".1f"),
            *(_number(row, name, 1, "+.2f") for name in numbers),
        )
        for arm, row in displaced
    ]
    grid = PageTable(("", "pairs", "y_w fell, %", *numbers.values()), rows, "95 % intervals over pairs.")
    return Section("What became of the preferred responses", text, [grid])


def _signs(displaced: Sequence[tuple[str, Row]], arms: Mapping[str, pa.Table]) -> Section:
    """How the change of the preferred responses goes with what the reference model said of the pairs."""
    text = [
        "Spearman's ρ of the change of log π(y_w | x) and what the reference model says of a pair: below "
        "zero, pairs with more of it fall more."
    ]
    rows = [
        (f"{arm}, {row['group']}", *(_number(row, sign, 1, "+.2f") for sign in SIGNS))
        for arm, row in displaced
    ]
    grid = PageTable(("ρ", *SIGNS.values()), rows, "95 % intervals over pairs.")
    pictures = [
        Picture(
            f"displacement-{sign}", displacement_figure(arms, sign), f"By {written}, with 95 % intervals."
        )
        for sign, written in SIGNS.items()
        if all(pairs[sign].null_count == 0 for pairs in arms.values())
    ]
    return Section("Could the reference model tell", text, [grid], pictures)


def _number(row: Row, key: str, scale: float, form: str) -> str:
    value, low, high = (scale * row[f"{key}{end}"] for end in ("", "_low", "_high"))
    interval = "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"
    return "" if math.isnan(value) else f"{value:{form}}{interval}"


def _differences(differences: pa.Table) -> Section:
    """Every two arms."""
    rows = [
        (
            f"{row['arm']} − {row['reference']}",
            measure_name(row),
            str(row["paired_n"]),
            _difference(row),
            p_value(row["p"]),
        )
        for row in differences.to_pylist()
    ]
    text = [
        f"{len(rows)} paired tests over each prompt's mean of the seeds, without a correction for their "
        "number."
    ]
    grid = PageTable(
        ("arms", "measure", "n", "difference, points", "p"), rows, "95 % intervals over clusters of prompts."
    )
    return Section("Every two arms", text, [grid], folded=True)


def _all_measures(results: pa.Table) -> Section:
    headings = ("arm", "measure", "n", "dropped", "value", "seeds from", "to", "difference", "p")
    rows = [
        (
            row["arm"],
            measure_name(row),
            str(row["n"]),
            str(row["dropped"]),
            _cell({**row, "p": None}),
            f"{100 * row['seed_low']:.1f}",
            f"{100 * row['seed_high']:.1f}",
            _difference(row),
            "" if row["p"] is None else p_value(row["p"]),
        )
        for row in results.to_pylist()
    ]
    return Section(
        "All measures", tables=[PageTable(headings, rows, "The same as results.csv.")], folded=True
    )


def _difference(row: Row) -> str:
    if row["difference"] is None:
        return ""
    bounds = (row["difference_low"], row["difference_high"])
    interval = "" if None in bounds else f" ({100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f})"
    return f"{100 * row['difference']:+.1f}{interval}"


def _bars(rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """Each arm's measures with their intervals, and the range of its seeds."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = plain_axes(5.6, 1.2 + 0.34 * len(arms) * max(1, len(measures) / 2))
    height = 0.7 / len(measures)
    for number, measure in enumerate(measures):
        colour = COLOURS[number % len(COLOURS)]
        shown = {row["arm"]: row for row in rows if measure_name(row) == measure}
        at = [arms.index(arm) + (number - (len(measures) - 1) / 2) * height for arm in shown]
        values = [100 * row["value"] for row in shown.values()]
        errors = [[100 * abs(row["value"] - row[end]) for row in shown.values()] for end in ("low", "high")]
        axes.errorbar(values, at, xerr=errors, fmt="o", c=colour, ms=5, capsize=2, lw=1, label=measure)
        for y, row in zip(at, shown.values(), strict=True):
            if row["seeds"] > 1:
                axes.plot([100 * row["seed_low"], 100 * row["seed_high"]], [y, y], "|", c=colour, ms=9)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlabel="percent", xlim=(-3, 103))
    axes.invert_yaxis()
    axes.grid(axis="x", lw=0.4, alpha=0.5)
    legend_below(axes)
    return figure


def _front(rows: Sequence[Row], up: str, right: str) -> Figure:
    """One measure against another, a point an arm."""
    figure, axes = plain_axes(5.0, 4.2)
    at = {(row["arm"], measure_name(row)): 100 * row["value"] for row in rows}
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        if (arm, up) in at and (arm, right) in at:  # names beside the points would hide each other
            colour, mark = COLOURS[number % len(COLOURS)], _MARKS[number % len(_MARKS)]
            axes.plot(at[arm, right], at[arm, up], mark, c=colour, ms=7, alpha=0.8, ls="", label=arm)
    axes.set(xlabel=f"{right} (percent)", ylabel=f"{up} (percent)")
    axes.margins(0.12)
    legend_below(axes)
    return figure


def _curve(plan: Experiment, rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """The measures over the value that the arms vary; DPO and the base model as lines."""
    figure, axes = plain_axes(5.6, 4.2)
    values = {arm.name: float(arm.params[plan.axis]) for arm in plan.arms[1:] if plan.axis}
    reference = plan.arms[0].name
    for number, measure in enumerate(measures):
        colour = (BLUE, ORANGE)[number]
        shown = [row for row in rows if measure_name(row) == measure]
        points = sorted((values[row["arm"]], row) for row in shown if row["arm"] in values)
        ys = [100 * row["value"] for _, row in points]
        errors = [[100 * abs(row["value"] - row[end]) for _, row in points] for end in ("low", "high")]
        axes.errorbar([x for x, _ in points], ys, errors, c=colour, marker="o", capsize=3, label=measure)
        for row in shown:
            if row["arm"] in (reference, BASE):
                style = "--" if row["arm"] == reference else ":"
                axes.axhline(100 * row["value"], c=colour, ls=style, lw=0.9, label=f"{measure}, {row['arm']}")
    axes.set(xlabel=plan.axis, ylabel="percent (95 % interval)", ylim=(-3, 103))
    if max(values.values()) / min(values.values()) > 8:
        axes.set_xscale("log")
        axes.set_xticks(list(values.values()), [f"{value:g}" for value in values.values()])
        axes.minorticks_off()
    legend_below(axes)
    return figure
