"""The scores of a run as numbers, tables and figures: mutual information and CHES of its pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from bdpo.method.base import Method
from bdpo.method.mi import mi_floor_of
from bdpo.reports.page import BLUE, GREEN, INK, ORANGE, plain_axes
from bdpo.stats import mean_of_many, rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

GROUPS = ("safe", "unsafe", None)

_COLOURS = {"safe": BLUE, "unsafe": ORANGE, None: GREEN}

_POINTS = 1500  # more in a group are drawn as a density

_BARS = 15


@dataclass(frozen=True)
class Distribution:
    """The mean and the `QUANTILES` of a sample."""

    mean: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> Distribution:
        """The distribution of values, shape (n,)."""
        return cls(float(values.mean()), tuple(float(q) for q in np.quantile(values, QUANTILES)))


@dataclass(frozen=True)
class MiDistribution(Distribution):
    """The distribution of MI in nats per token; shares of values below 0, and below `mi_floor`."""

    negative: float
    floored: float

    @classmethod
    def of_mi(cls, mi: np.ndarray, floor: float) -> MiDistribution:
        """The distribution of mutual information, shape (pairs,)."""
        every = Distribution.of(mi)
        floored = float((mi < np.float32(floor)).mean())
        return cls(every.mean, every.quantiles, float((mi < 0).mean()), floored)


@dataclass(frozen=True)
class GroupSummary:
    """The scores of one group of pairs.

    `chosen_better` is the share of pairs whose chosen response has the greater MI; `chosen` and
    `rejected` are the distributions of the MI of both responses, `ches` that of CHES, None if unknown.
    """

    group: str | None
    pairs: int
    chosen_better: float
    chosen: MiDistribution
    rejected: MiDistribution
    ches: Distribution | None


@dataclass(frozen=True)
class Imbalance:
    """Which response of a group's pairs has the greater MI, how often and by how much; 95 % intervals.

    `chosen_better` is the share of pairs in which it is the chosen one; `difference` is the mean of I_w − I_l
    in nats per token, with `low` and `high`; `p` is for the hypothesis that the mean is 0; `apart` is the
    median of |I_w − I_l|.
    """

    group: str | None
    pairs: int
    chosen_better: float
    chosen_better_low: float
    chosen_better_high: float
    difference: float
    low: float
    high: float
    p: float
    apart: float


def mi_summary(scores: pa.Table, method: Method) -> list[GroupSummary]:
    """A summary of each group of pairs, safe, unsafe and without a group; `method` has the `mi_floor`."""
    summaries = []
    for (group, chosen, rejected), (_, mask) in zip(_by_group(scores), _masks(scores), strict=True):
        ches = scores["ches"].filter(mask)
        summaries.append(
            GroupSummary(
                group=group,
                pairs=len(chosen),
                chosen_better=float((chosen > rejected).mean()),
                chosen=MiDistribution.of_mi(chosen, mi_floor_of(method)),
                rejected=MiDistribution.of_mi(rejected, mi_floor_of(method)),
                ches=None if ches.null_count else Distribution.of(ches.to_numpy()),
            )
        )
    return summaries


def mi_imbalance(scores: pa.Table) -> list[Imbalance]:
    """The imbalance of the MI in each group of pairs."""
    rows = []
    for group, chosen, rejected in _by_group(scores):
        better = rate((chosen > rejected).tolist()).columns("chosen_better")
        difference = chosen.astype(float) - rejected
        mean = mean_of_many(difference)
        rows.append(
            Imbalance(
                group=group,
                pairs=len(chosen),
                **better,  # type: ignore[arg-type] # of at least one pair: no value is None
                difference=mean.value,  # type: ignore[arg-type]
                low=mean.low,  # type: ignore[arg-type]
                high=mean.high,  # type: ignore[arg-type]
                p=float(stats.ttest_1samp(difference, 0).pvalue),
                apart=float(np.median(abs(difference))),
            )
        )
    return rows


def mi_tables(scores: pa.Table, method: Method) -> list[Table]:
    """A table for each group with the distribution of the MI; all histograms have the same scale."""
    values = np.concatenate([scores["mi_chosen"].to_numpy(), scores["mi_rejected"].to_numpy()])
    low, high = np.quantile(values, [0.005, 0.995])
    tables = []
    for row, (_, chosen, rejected) in zip(mi_summary(scores, method), _by_group(scores), strict=True):
        title = f"{row.group or 'all'} queries: {row.pairs:,} pairs, chosen better understood"
        table = _table(f"{title} in {row.chosen_better:.0%}", "nats/token")
        for heading in ["mean", *(f"{q:.0%}" for q in QUANTILES), "< 0", "< floor"]:
            table.add_column(heading, justify="right")
        table.add_column(f"{low:.2f} to {high:.2f}", no_wrap=True)
        for side, found, mi in (("chosen", row.chosen, chosen), ("rejected", row.rejected, rejected)):
            numbers = [f"{number:.3f}" for number in (found.mean, *found.quantiles)]
            shares = f"{found.negative:.0%}", f"{found.floored:.0%}"
            table.add_row(side, *numbers, *shares, _histogram(mi, low, high))
        if row.ches is not None:
            ches = [f"{number:.4g}" for number in (row.ches.mean, *row.ches.quantiles)]
            table.add_row("CHES", *ches)
        tables.append(table)
    return tables


def work_table(workers: dict[str, dict[str, float]]) -> Table:
    """The work of each scoring actor: pairs, real tokens, busy time, speed, and forwarded per real tokens."""
    table = _table("work of the scoring actors", "actor")
    for heading in ("pairs", "tokens", "busy", "tokens/s", "padded / real"):
        table.add_column(heading, justify="right")
    total = {key: sum(work[key] for work in workers.values()) for key in next(iter(workers.values()))}
    for name, work in [*sorted(workers.items()), ("all", total)]:
        if name == "all":
            table.add_section()
        table.add_row(
            name,
            f"{work['pairs']:,}",
            f"{work['tokens']:,}",
            f"{work['seconds']:.1f} s",
            f"{work['tokens'] / work['seconds']:,.0f}",
            f"{work['tokens_forwarded'] / work['tokens']:.3f}",
        )
    return table


def _table(title: str, rows: str) -> Table:
    """An empty table in a layout that fits a terminal of 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(rows)
    return table


def _histogram(values: np.ndarray, low: float, high: float) -> str:
    """`_BARS` bars of eight heights, the tallest one full; outliers count in the first and the last bar."""
    counts, _ = np.histogram(values.clip(low, high), bins=_BARS, range=(low, high))
    heights = np.ceil(8 * counts / counts.max()).astype(int)
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


def mi_scatter(scores: pa.Table) -> Figure:
    """Figure 2 of the paper: MI of the rejected against the chosen response, a panel for each group.

    Up to `_POINTS` pairs are drawn as points, more as a density, so that the file stays small. The outermost
    0.2 % at either end are outside the axes.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.figure import Figure

    groups = _by_group(scores)
    figure = Figure(figsize=(0.6 + 3.4 * len(groups), 3.9), layout="constrained")
    everything = np.concatenate([side for _, *sides in groups for side in sides])
    low, high = np.quantile(everything, [0.002, 0.998])
    margin = 0.05 * (high - low) or 0.1
    bounds = (float(low - margin), float(high + margin))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (group, chosen, rejected) in zip(panels, groups, strict=True):
        colour = _COLOURS[group]
        if len(chosen) <= _POINTS:
            axes.scatter(chosen, rejected, s=8, alpha=0.5, lw=0, c=colour)
        else:
            shades = LinearSegmentedColormap.from_list("", [(*to_rgb(colour), 0.12), (*to_rgb(colour), 1)])
            axes.hexbin(
                chosen, rejected, gridsize=60, extent=2 * bounds, mincnt=1, bins="log", cmap=shades, lw=0
            )
            axes.collections[0].set_rasterized(True)
        axes.axline((0, 0), slope=1, c=INK, lw=0.8, ls="--")
        better = float((chosen > rejected).mean())
        axes.set_title(f"{group or 'all'} queries ({len(chosen):,}): {better:.0%} below the line", fontsize=9)
        axes.set(xlim=bounds, ylim=bounds, aspect="equal", xlabel="MI of the preferred response")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("MI of the dispreferred response")
    return figure


def mi_difference(scores: pa.Table) -> Figure:
    """The distribution of |I_w − I_l|, a line for each group."""
    figure, axes = plain_axes(5.2, 3.9)
    groups = [(group, abs(chosen - rejected)) for group, chosen, rejected in _by_group(scores)]
    edges = np.linspace(0, max(np.quantile(np.concatenate([d for _, d in groups]), 0.995), 1e-6), 41)
    for group, difference in groups:
        share = np.histogram(difference.clip(max=edges[-1]), edges)[0] / len(difference)
        median = float(np.median(difference))
        axes.stairs(100 * share, edges, color=_COLOURS[group], label=f"{group or 'all'} queries")
        axes.axvline(median, c=_COLOURS[group], lw=0.8, ls=":")
    axes.set(
        xlabel="|I_w − I_l| (nats per token; dotted: median)", ylabel="percent of the pairs", xlim=(0, None)
    )
    axes.legend(frameon=False, fontsize="small")
    return figure


def _by_group(scores: pa.Table) -> list[tuple[str | None, np.ndarray, np.ndarray]]:
    """(group, mi_chosen, mi_rejected) of every group that has pairs."""
    chosen, rejected = scores["mi_chosen"].to_numpy(), scores["mi_rejected"].to_numpy()
    return [(group, chosen[mask], rejected[mask]) for group, mask in _masks(scores)]


def _masks(scores: pa.Table) -> list[tuple[str | None, np.ndarray]]:
    """(group, mask of its rows) of every group that has pairs."""
    groups = np.array(scores["group"].to_pylist(), dtype=object)
    masks = [(group, groups == group) for group in GROUPS]
    return [(group, mask) for group, mask in masks if mask.any()]
