"""What an experiment shows: a table for the terminal, figures, and the page with all of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv

from bdpo.config import Config
from bdpo.evaluation.summary import CONFIDENCE_LEVEL
from bdpo.experiments import BASE, Experiment
from bdpo.page import BLUE, GREEN, GREY, ORANGE, PINK, Grid, Page, Part, Picture
from bdpo.report import measure_name, sentence, training, understanding, what_was_run
from bdpo.runs import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Row = dict[str, Any]
Logs = Mapping[str, Sequence[Sequence[Row]]]  # arm -> the metrics of each seed

_MAIN = ("safety", "compliance", "correct", "accuracy")
"""Measures that stand for their benchmark where there is room for one."""


def csv_bytes(table: pa.Table) -> bytes:
    """A table as CSV."""
    target = io.BytesIO()
    pyarrow.csv.write_csv(table, target)
    return target.getvalue()


def main_rows(results: pa.Table) -> list[Row]:
    """Rows of the results whose measure stands for its benchmark."""
    return [row for row in results.to_pylist() if row["measure"].partition(",")[0] in _MAIN]


def arms_table(results: pa.Table) -> Table:
    """The main measures of every arm, for the terminal."""
    from rich.table import Table

    rows = main_rows(results)
    measures = list(dict.fromkeys(measure_name(row) for row in rows))
    caption = f"percent ({CONFIDENCE_LEVEL:.0%} interval over prompts); p against the first arm, paired"
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
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    tested = "" if row["p"] is None else f", p {'<0.001' if row['p'] < 0.001 else format(row['p'], '.2g')}"
    return f"{value:.1f} ({low:.1f}–{high:.1f}{tested})"


def experiment_page(
    config: Config, run: RunDir, plan: Experiment, results: pa.Table | None, logs: Logs
) -> Page:
    """The page of an experiment; `results` is None where nothing is trained."""
    parts: list[Part | None] = [what_was_run(config, run)]
    if results is not None:
        parts += [_arms(config, plan), _findings(plan, results), _everything(results)]
    parts += [understanding(config, run), training(logs)]
    return Page(plan.title, [plan.question], [part for part in parts if part is not None])


def _arms(config: Config, plan: Experiment) -> Part:
    keys = list(dict.fromkeys(key for arm in plan.arms for key in arm.params))
    rows = [(arm.name, *(str(arm.params.get(key, "")) for key in keys)) for arm in plan.arms]
    seeds = ", ".join(map(str, config.experiment.seeds))
    text = f"Each arm is trained with the seeds {seeds}; all else is as in the run's config."
    return Part("The arms", [text], [Grid(("arm", *keys), rows)])


def _findings(plan: Experiment, results: pa.Table) -> Part:
    rows = main_rows(results)
    measures = list(dict.fromkeys(measure_name(row) for row in rows))
    reference = plan.arms[0].name
    pictures = []
    if plan.axis:
        pictures.append(Picture("curve", _curve(plan, rows, measures), f"Over {plan.axis}, with intervals."))
    pictures.append(
        Picture("arms", _bars(rows, measures), "95 % intervals over prompts; marks: single seeds.")
    )
    if len(measures) > 1:
        pictures.append(
            Picture("front", _front(rows, measures), "Both at once: up and to the right is better.")
        )
    said = [
        sentence(measure_name(row), reference, row["arm"], _compared(row, rows)) for row in rows if row["p"]
    ]
    grid = Grid(
        ("percent", *measures),
        [(arm, *cells) for arm, cells in _by_arm(rows, measures).items()],
        f"Mean over prompts and seeds, 95 % interval over prompts; p of the paired test against {reference}.",
    )
    return Part("What came of it", said, [grid], pictures)


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """A row of the results as `paired_difference` would say it."""
    return {
        "n": row["n"],
        "first": row["value"] - row["difference"],
        "second": row["value"],
        "difference": row["difference"],
        "low": row["difference_low"],
        "high": row["difference_high"],
        "p": row["p"],
    }


def _everything(results: pa.Table) -> Part:
    headings = ("arm", "measure", "n", "value", "seeds from", "to", "difference", "p")
    rows = [
        (
            row["arm"],
            measure_name(row),
            str(row["n"]),
            _cell({**row, "p": None}),
            f"{100 * row['seed_low']:.1f}",
            f"{100 * row['seed_high']:.1f}",
            "" if row["difference"] is None else f"{100 * row['difference']:+.1f}",
            "" if row["p"] is None else f"{row['p']:.2g}",
        )
        for row in results.to_pylist()
    ]
    return Part("All measures", grids=[Grid(headings, rows, "The same as results.csv.")], folded=True)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """Each arm's measures with their intervals, and the range of its seeds."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure, axes = _axes(5.6, 1.2 + 0.34 * len(arms) * max(1, len(measures) / 2))
    height = 0.7 / len(measures)
    for number, measure in enumerate(measures):
        colour = (BLUE, ORANGE, GREEN, PINK, GREY)[number % 5]
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
    _legend(figure, axes)
    return figure


def _front(rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """The first measure against the second, a point an arm."""
    figure, axes = _axes(5.0, 4.2)
    up, right = measures[0], measures[1]
    at = {(row["arm"], measure_name(row)): 100 * row["value"] for row in rows}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        if (arm, up) in at and (arm, right) in at:
            point = (at[arm, right], at[arm, up])
            axes.plot(*point, "s" if arm == BASE else "o", c=GREY if arm == BASE else BLUE)
            axes.annotate(arm, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=f"{right} (percent)", ylabel=f"{up} (percent)")
    axes.margins(0.12)
    return figure


def _curve(plan: Experiment, rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """The measures over the value that the arms vary; DPO and the base model as lines."""
    figure, axes = _axes(5.6, 4.2)
    values = {arm.name: float(arm.params[plan.axis]) for arm in plan.arms[1:] if plan.axis}
    reference = plan.arms[0].name
    for number, measure in enumerate(measures[:2]):
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
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it hides no point."""
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
