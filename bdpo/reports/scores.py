"""What the scores of a run show: the mutual information of its pairs, as numbers, tables and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def mi_summary(scores: pa.Table, method: Method) -> list[dict[str, Any]]:
    """One row a group of pairs: their number, and the MI of both responses (nats per token).

    `chosen_better` is the share of pairs whose chosen response is better understood. `chosen` and
    `rejected` have the `mean`, the `QUANTILES`, and the shares of responses whose MI is `negative` and
    whose MI is `floored`: below `mi_floor`. `ches` has `mean` and `quantiles` of the pairs' CHES, None where
    it is not known.
    """
    return [
        {
            "group": group,
            "pairs": len(chosen),
            "chosen_better": float((chosen > rejected).mean()),
            "chosen": _mi_of(chosen, method),
            "rejected": _mi_of(rejected, method),
            "ches": _ches_of(scores["ches"].filter(mask)),
        }
        for (group, chosen, rejected), (_, mask) in zip(_by_group(scores), _masks(scores), strict=True)
    ]


def _distribution(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "quantiles": [float(q) for q in np.quantile(values, QUANTILES)]}


def _ches_of(ches: pa.ChunkedArray) -> dict[str, Any] | None:
    return None if ches.null_count else _distribution(ches.to_numpy())


def _mi_of(mi: np.ndarray, method: Method) -> dict[str, Any]:
    return {
        **_distribution(mi),
        "negative": float((mi < 0).mean()),
        "floored": float((mi < np.float32(mi_floor_of(method))).mean()),
    }


def mi_imbalance(scores: pa.Table) -> list[dict[str, Any]]:
    """One row a group: which response is better understood, how often, by how much; 95 % intervals.

    `chosen_better`, a share; `difference`, the mean of I_w − I_l in nats per token; `apart`, the median of
    its absolute value; `p` of the hypothesis that the mean is 0.
    """
    rows = []
    for group, chosen, rejected in _by_group(scores):
        better = rate((chosen > rejected).tolist())
        difference = chosen.astype(float) - rejected
        apart = mean_of_many(difference)
        rows.append(
            {
                "group": group,
                "pairs": len(chosen),
                **better.columns("chosen_better"),
                "difference": apart.value,
                "low": apart.low,
                "high": apart.high,
                "p": float(stats.ttest_1samp(difference, 0).pvalue),
                "apart": float(np.median(abs(difference))),
            }
        )
    return rows


def mi_tables(scores: pa.Table, method: Method) -> list[Table]:
    """The distribution of the MI, a table a group, with histograms on one scale for all."""
    values = np.concatenate([scores["mi_chosen"].to_numpy(), scores["mi_rejected"].to_numpy()])
    low, high = np.quantile(values, [0.005, 0.995])
    tables = []
    for row, (_, chosen, rejected) in zip(mi_summary(scores, method), _by_group(scores), strict=True):
        title = f"{row['group'] or 'all'} queries: {row['pairs']:,} pairs, chosen better understood"
        table = _table(f"{title} in {row['chosen_better']:.0%}", "nats/token")
        for heading in ["mean", *(f"{q:.0%}" for q in QUANTILES), "< 0", "< floor"]:
            table.add_column(heading, justify="right")
        table.add_column(f"{low:.2f} to {high:.2f}", no_wrap=True)
        for side, mi in (("chosen", chosen), ("rejected", rejected)):
            numbers = [f"{number:.3f}" for number in (row[side]["mean"], *row[side]["quantiles"])]
            shares = [f"{row[side][share]:.0%}" for share in ("negative", "floored")]
            table.add_row(side, *numbers, *shares, _histogram(mi, low, high))
        if row["ches"] is not None:
            ches = [f"{number:.4g}" for number in (row["ches"]["mean"], *row["ches"]["quantiles"])]
            table.add_row("CHES", *ches)
        tables.append(table)
    return tables


def work_table(workers: dict[str, dict[str, float]]) -> Table:
    """What every scoring worker did: pairs, real tokens, busy time, speed, and how much padding cost."""
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
    """Fits a terminal of 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(rows)
    return table


def _histogram(values: np.ndarray, low: float, high: float) -> str:
    """Eight heights of `_BARS` bars, the tallest bar full; what lies outside is in the first and the last."""
    counts, _ = np.histogram(values.clip(low, high), bins=_BARS, range=(low, high))
    heights = np.ceil(8 * counts / counts.max()).astype(int)
    return "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights)


def mi_scatter(scores: pa.Table) -> Figure:
    """Figure 2 of the paper: MI of the rejected against the chosen response, a panel for each group.

    Few pairs are drawn one by one, of many their density: the figure stays as small as it is. The outermost
    0.2 % at either end lie outside.
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
    """How far apart the two responses of a pair are understood: |I_w − I_l|, a line for each group."""
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
    """(group, which rows are of it) of every group that has pairs."""
    groups = np.array(scores["group"].to_pylist(), dtype=object)
    masks = [(group, groups == group) for group in GROUPS]
    return [(group, mask) for group, mask in masks if mask.any()]
