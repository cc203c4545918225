"""The figures of a search: objective over the space, objective against constraint, and progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from bdpo.config import Range, TuneConfig
from bdpo.evaluation.benchmarks.registry import path_label
from bdpo.evaluation.measures import Summary
from bdpo.reports.page import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    legend_below,
    plain_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_KEYS = {"method.alpha": "α", "method.beta": "β", "method.sharpness": "γ"}

Row = dict[str, Any]


def search_figures(results: pa.Table, tune: TuneConfig, base: Summary) -> dict[str, Figure]:
    """`space`, `front` and `progress`.

    `results` are the rows of `results_table`, `base` what `summarise` gave for the base model on the same
    prompts. Only trials that reached the last rung have numbers in a figure: others were measured on fewer
    prompts, with a model in the middle of its schedule. A figure without any data is left out.
    """
    rows = [row for row in results.to_pylist() if row["status"] == "completed"]
    stopped = [row for row in results.to_pylist() if row["status"] == "stopped"]
    numbers = [key for key in tune.space if _is_number(rows, key)]
    figures = {}
    if len(numbers) == 1:
        figures["space"] = _curve(rows, tune, numbers[0], base)
    elif numbers:
        figures["space"] = _map(rows, stopped, tune, numbers[0], numbers[1])
    if rows:
        figures |= {"front": _front(rows, tune, base), "progress": _progress(rows, tune)}
    return figures


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in both and better in one."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]


def _map(rows: list[Row], stopped: list[Row], tune: TuneConfig, x: str, y: str) -> Figure:
    """Trials over two keys, coloured by the objective, which is interpolated between them."""
    figure, axes = plain_axes(5.2, 4.2)
    xs, ys = (np.array([float(row[key]) for row in rows]) for key in (x, y))
    values = 100 * np.array([row["objective"] for row in rows])
    least = max(0.0, 10 * ((values.min() - 1e-9) // 10))
    style: dict[str, Any] = {"cmap": "viridis", "vmin": least, "vmax": 100}
    flat = np.stack([_flat(tune, x, xs), _flat(tune, y, ys)])
    if len(rows) > 3 and np.linalg.matrix_rank(flat - flat.mean(axis=1, keepdims=True), tol=1e-6) == 2:
        _surface(axes, tune, (x, y), flat, values, least)
    feasible = np.array([row["feasible"] for row in rows])
    edge: dict[str, Any] = {"s": 55, "ec": "black", "lw": 0.8, "zorder": 3, "clip_on": False, **style}
    for mask, marker, label in ((feasible, "o", "within the bound"), (~feasible, "X", "below the bound")):
        if mask.any():
            points = axes.scatter(xs[mask], ys[mask], c=values[mask], marker=marker, label=label, **edge)
    for row, value in zip(rows, values, strict=True):
        text: dict[str, Any] = {"xytext": (8, 5), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"{value:.0f}", (float(row[x]), float(row[y])), **text)
    if stopped:
        at = [[float(row[key]) for row in stopped] for key in (x, y)]
        axes.plot(*at, ".", c=INK, label="stopped early", clip_on=False)
    _mark_winner(axes, rows, x, y)
    _scale(axes, "x", tune, x)
    _scale(axes, "y", tune, y)
    figure.colorbar(points, ax=axes, label=f"{path_label(tune.metric)} (percent)")
    legend_below(axes)
    return figure


def _surface(
    axes: Axes, tune: TuneConfig, keys: tuple[str, str], flat: np.ndarray, values: np.ndarray, least: float
) -> None:
    """The interpolated objective, paler than the measured points; linear in the scale of each axis.

    `flat` has both keys of each trial in these scales, shape (2, trials).
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.tri import LinearTriInterpolator, Triangulation, UniformTriRefiner

    measured = Triangulation(*flat)
    between = LinearTriInterpolator(measured, values)
    fine, refined = UniformTriRefiner(measured).refine_field(values, triinterpolator=between, subdiv=4)
    xs, ys = (_unflat(tune, key, at) for key, at in zip(keys, (fine.x, fine.y), strict=True))
    levels = np.linspace(least, 100, 41)
    colours = ListedColormap(1 - 0.55 * (1 - colormaps["viridis"](np.linspace(0, 1, 40))[:, :3]))
    # Rounding must not move the lowest and the highest value out of the levels.
    drawn = np.clip(refined, least, 100)
    filled = axes.tricontourf(Triangulation(xs, ys, fine.triangles), drawn, levels=levels, cmap=colours)
    filled.set_edgecolor("face")  # else thin gaps show between the levels


def _curve(rows: list[Row], tune: TuneConfig, key: str, base: Summary) -> Figure:
    """Objective and constraint over one key, with their intervals."""
    figure, axes = plain_axes(5.2, 4.2)
    rows = sorted(rows, key=lambda row: float(row[key]))
    xs = [float(row[key]) for row in rows]
    for name, path, colour in (("objective", tune.metric, BLUE), ("constraint", tune.constraint, ORANGE)):
        values, low, high = (
            100 * np.array([row[column] for row in rows]) for column in (name, f"{name}_low", f"{name}_high")
        )
        axes.errorbar(
            xs, values, (values - low, high - values), c=colour, marker="o", capsize=3, label=path_label(path)
        )
        axes.axhline(100 * _at(base, path), c=colour, lw=0.8, ls=":", label=f"{path_label(path)}, base")
    axes.axhline(100 * _bound(rows), c=GREY, lw=0.8, ls="--", label="least allowed")
    _scale(axes, "x", tune, key)
    axes.set(ylabel="percent (95 % interval)", ylim=(-3, 103))
    legend_below(axes)
    return figure


def _front(rows: list[Row], tune: TuneConfig, base: Summary) -> Figure:
    """Objective against constraint: every trial, the Pareto front, the base model and the bound."""
    figure, axes = plain_axes(5.2, 4.2)
    points = [(100 * row["constraint"], 100 * row["objective"]) for row in rows]
    errors: dict[str, Any] = {
        f"{axis}err": 100
        * abs(np.array([[row[name] - row[f"{name}_{end}"] for row in rows] for end in ("low", "high")]))
        for axis, name in (("x", "constraint"), ("y", "objective"))
    }
    xs, ys = zip(*points, strict=True)
    errors |= {"ecolor": "#6aaed6", "elinewidth": 1, "capsize": 2}
    axes.errorbar(xs, ys, fmt="o", c=BLUE, label="trials", **errors)
    # At a constraint between two trials of the front, the safety of the one to the right is available.
    front = sorted(points[i] for i in pareto_front(points))
    axes.step(*zip(*front, strict=True), where="pre", c=INK, lw=1.6, zorder=3, label="Pareto front")
    at_base = (100 * _at(base, tune.constraint), 100 * _at(base, tune.metric))
    axes.plot(*at_base, "s", c=ORANGE, ms=8, label="base model")
    axes.axvline(100 * _bound(rows), c=GREY, lw=0.8, ls="--", label="least allowed")
    _mark_winner(axes, [row | {"x": x, "y": y} for row, (x, y) in zip(rows, points, strict=True)], "x", "y")
    axes.set(xlabel=f"{path_label(tune.constraint)} (percent)", ylabel=f"{path_label(tune.metric)} (percent)")
    legend_below(axes)
    return figure


def _progress(rows: list[Row], tune: TuneConfig) -> Figure:
    """The objective of completed trials in order of completion, and the best so far within the bound."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = plain_axes(5.2, 4.2)
    rows = sorted(rows, key=lambda row: row["finished"])
    values = 100 * np.array([row["objective"] for row in rows])
    feasible = np.array([row["feasible"] for row in rows])
    order = np.arange(1, len(rows) + 1)
    best = np.maximum.accumulate(np.where(feasible, values, -np.inf))
    axes.scatter(order[feasible], values[feasible], c=BLUE, label="within the bound", zorder=3)
    if not feasible.all():
        below = order[~feasible], values[~feasible]
        axes.scatter(*below, c=ORANGE, marker="X", label="below the bound", zorder=3)
    known = np.isfinite(best)
    axes.step(order[known], best[known], where="post", c=GREEN, label="best so far within the bound")
    axes.set(xlabel="completed trials", ylabel=f"{path_label(tune.metric)} (percent)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(axes)
    return figure


def _mark_winner(axes: Axes, rows: list[Row], x: str, y: str) -> None:
    for row in rows:
        if row["winner"]:
            ring: dict[str, Any] = {"ms": 13, "mfc": "none", "mec": GREEN, "mew": 2, "label": "chosen"}
            ring |= {"zorder": 4, "clip_on": False, "ls": "none"}
            axes.plot(float(row[x]), float(row[y]), "o", **ring)


def _at(summary: Summary, path: str) -> float:
    return summary.estimate(path).known


def _bound(rows: list[Row]) -> float:
    return float(rows[0]["least"])


def _is_number(rows: list[Row], key: str) -> bool:
    return len({row[key] for row in rows}) > 1 and all(
        isinstance(row[key], int | float) and not isinstance(row[key], bool) for row in rows
    )


def _scale(axes: Axes, which: Literal["x", "y"], tune: TuneConfig, key: str) -> None:
    """An axis with the limits and the scale of the space, and plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    dimension, axis = tune.space[key], {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}label": _KEYS.get(key, key)})
    if isinstance(dimension, Range):
        axes.set(**{f"{which}scale": "log" if dimension.log else "linear"})
        axes.set(**{f"{which}lim": (dimension.min, dimension.max)})
        if dimension.log:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _is_log(tune: TuneConfig, key: str) -> bool:
    dimension = tune.space[key]
    return isinstance(dimension, Range) and dimension.log


def _flat(tune: TuneConfig, key: str, values: np.ndarray) -> np.ndarray:
    """The positions of the values of a key on its axis, up to a factor."""
    return np.log(values) if _is_log(tune, key) else values


def _unflat(tune: TuneConfig, key: str, places: np.ndarray) -> np.ndarray:
    return np.exp(places) if _is_log(tune, key) else places
