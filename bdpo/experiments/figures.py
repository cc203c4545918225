"""The figures of an experiment: the measures of its arms, one against the other, and along what they vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bdpo.experiments.arms import Arm
from bdpo.experiments.results import BASE, ArmMeasure
from bdpo.reports.page import BLUE, COLOURS, ORANGE, legend_below, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = "os^DvP*"


def bars(rows: Sequence[ArmMeasure], measures: Sequence[str]) -> Figure:
    """The measures of each arm with their intervals, and the lowest and the highest of its seeds."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    figure, axes = plain_axes(5.6, 1.2 + 0.34 * len(arms) * max(1, len(measures) / 2))
    height = 0.7 / len(measures)
    for number, measure in enumerate(measures):
        colour = COLOURS[number % len(COLOURS)]
        shown = {row.arm: row for row in rows if row.label == measure}
        at = [arms.index(arm) + (number - (len(measures) - 1) / 2) * height for arm in shown]
        values, errors = _percent_with_errors(list(shown.values()))
        axes.errorbar(values, at, xerr=errors, fmt="o", c=colour, ms=5, capsize=2, lw=1, label=measure)
        for y, row in zip(at, shown.values(), strict=True):
            if row.seeds > 1:
                axes.plot([100 * row.seed_low, 100 * row.seed_high], [y, y], "|", c=colour, ms=9)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlabel="percent", xlim=(-3, 103))
    axes.invert_yaxis()
    axes.grid(axis="x", lw=0.4, alpha=0.5)
    legend_below(axes)
    return figure


def front(rows: Sequence[ArmMeasure], up: str, right: str) -> Figure:
    """One measure against another, a point an arm."""
    figure, axes = plain_axes(5.0, 4.2)
    at = {(row.arm, row.label): 100 * row.value for row in rows}
    for number, arm in enumerate(dict.fromkeys(row.arm for row in rows)):
        if (arm, up) in at and (arm, right) in at:  # names beside the points would hide each other
            colour, mark = COLOURS[number % len(COLOURS)], _MARKS[number % len(_MARKS)]
            axes.plot(at[arm, right], at[arm, up], mark, c=colour, ms=7, alpha=0.8, ls="", label=arm)
    axes.set(xlabel=f"{right} (percent)", ylabel=f"{up} (percent)")
    axes.margins(0.12)
    legend_below(axes)
    return figure


def curve(axis: str, arms: Sequence[Arm], rows: Sequence[ArmMeasure], measures: Sequence[str]) -> Figure:
    """The measures over the key `axis` that the arms vary; the first arm and the base model as lines."""
    figure, axes = plain_axes(5.6, 4.2)
    values = {arm.name: float(arm.params[axis]) for arm in arms[1:]}
    for number, measure in enumerate(measures):
        colour = (BLUE, ORANGE)[number]
        shown = [row for row in rows if row.label == measure]
        points = sorted(((values[row.arm], row) for row in shown if row.arm in values), key=lambda p: p[0])
        ys, errors = _percent_with_errors([row for _, row in points])
        axes.errorbar([x for x, _ in points], ys, errors, c=colour, marker="o", capsize=3, label=measure)
        for row in shown:
            if row.arm in (arms[0].name, BASE):
                style = ":" if row.arm == BASE else "--"
                axes.axhline(100 * row.value, c=colour, ls=style, lw=0.9, label=f"{measure}, {row.arm}")
    axes.set(xlabel=axis, ylabel="percent (95 % interval)", ylim=(-3, 103))
    if max(values.values()) / min(values.values()) > 8:
        axes.set_xscale("log")
        axes.set_xticks(list(values.values()), [f"{value:g}" for value in values.values()])
        axes.minorticks_off()
    legend_below(axes)
    return figure


def _percent_with_errors(rows: Sequence[ArmMeasure]) -> tuple[list[float], list[list[float]]]:
    """Values in percent, and how far their intervals reach below and above them."""
    below = [100 * abs(row.value - row.low) for row in rows]
    above = [100 * abs(row.high - row.value) for row in rows]
    return [100 * row.value for row in rows], [below, above]
