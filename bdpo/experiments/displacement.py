"""Likelihood displacement: which preferred responses become less likely in training.

DPO widens the margin of a pair although log π(y_w | x) decreases (Razin et al. 2024, 'Unintentional
Unalignment: Likelihood Displacement in Direct Preference Optimization', which compares it with CHES).
Here it is compared with the mutual information as well, from which B-DPO computes its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bdpo.config import Config
from bdpo.experiments.arms import Arm, method_params
from bdpo.experiments.experiment import Experiment, Finding
from bdpo.experiments.jobs import Job, trained_scores
from bdpo.reports.page import COLOURS, GREY, PageSection, PageTable, Picture, legend_below, plain_axes
from bdpo.scoring.scores import finished_scores
from bdpo.stats import CONFIDENCE_LEVEL, ENDS, Estimate, mean_of_many, rate
from bdpo.storage.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNS = {
    "ches": "CHES",
    "mi_chosen": "I_w",
    "mi_rejected": "I_l",
    "imbalance": "|I_w − I_l|",
}
"""Quantities that the reference model gives for a pair before the training, and how they are written."""

_BINS = 10


def displaced_pairs(before: pa.Table, after: Sequence[pa.Table]) -> pa.Table:
    """One row per pair: `group`, the `SIGNS`, and the change of its log-probs in nats, mean over models.

    `change` is the change of log π(y_w | x), `change_rejected` that of log π(y_l | x).

    `before` are the scores of the reference model, `after` those of models that were trained from it, on the
    same pairs in any order. Pairs that training held out, or `data.select` left out, are included.

    Raises:
        ValueError: the scores are of different pairs.
    """
    ids = before["pair_id"].to_pylist()
    logps = {"change": "ref_chosen_logps", "change_rejected": "ref_rejected_logps"}
    changes: dict[str, list[np.ndarray]] = {name: [] for name in logps}
    for trained in after:
        row = {pair: number for number, pair in enumerate(trained["pair_id"].to_pylist())}
        if row.keys() != set(ids):
            raise ValueError("the scores of the trained model are of other pairs")
        same_order = trained.take([row[pair] for pair in ids])
        for name, column in logps.items():
            changes[name].append(same_order[column].to_numpy().astype(float) - before[column].to_numpy())
    difference = before["mi_chosen"].to_numpy() - before["mi_rejected"].to_numpy()
    signs = {name: before[name] for name in SIGNS if name != "imbalance"} | {"imbalance": abs(difference)}
    means = {name: np.mean(models, axis=0) for name, models in changes.items()}
    return pa.table({"group": before["group"], **signs, **means})


def displacement(pairs: pa.Table) -> list[dict[str, Any]]:
    """A row for all pairs and one for each group: the share that `fell`, mean changes, correlations.

    `change` and `change_rejected` are means over all pairs of the group; `lowest_ches` and `highest_ches` are
    the mean `change` of the tenth of the pairs with the lowest and the highest CHES. The correlations are
    Spearman's ρ of `change` and each of the `SIGNS`. Each value has `_low` and `_high`, its 95 % interval
    over pairs. Unknown values are nan: CHES of an architecture whose hidden states are not available, ρ with
    a sign that is the same for all pairs.
    """
    groups = np.array(pairs["group"].to_pylist(), dtype=object)
    names = [name for name in ("safe", "unsafe") if (groups == name).any()]
    rows = []
    for name in (None, *names):
        part = pairs if name is None else pairs.filter(groups == name)
        change = part["change"].to_numpy()
        tenths = _tenths(part, "ches") or [np.full(1, np.nan)]
        measured = {
            "fell": rate((change < 0).tolist()),
            "change": mean_of_many(change),
            "change_rejected": mean_of_many(part["change_rejected"].to_numpy()),
            "lowest_ches": mean_of_many(tenths[0]),
            "highest_ches": mean_of_many(tenths[-1]),
        }
        measured |= {sign: _spearman(part[sign], change) for sign in SIGNS}
        named: dict[str, float | None] = {}
        for key, found in measured.items():
            named |= found.columns(key)
        rows.append({"group": name or "all", "pairs": len(change), **named})
    return rows


def _tenths(pairs: pa.Table, sign: str) -> list[np.ndarray]:
    """The changes of the pairs in tenths by a sign, lowest first; fewer of few pairs, none if unknown."""
    if pairs[sign].null_count:
        return []
    change = pairs["change"].to_numpy()[np.argsort(pairs[sign].to_numpy(), kind="stable")]
    return np.array_split(change, max(1, min(_BINS, len(change) // 2)))


def _spearman(sign: pa.ChunkedArray, change: np.ndarray) -> Estimate:
    """ρ and its interval by Fisher's z with the variance of Bonett & Wright (2000)."""
    from scipy import stats

    values = sign.to_numpy(zero_copy_only=False).astype(float)
    if len(values) < 5 or np.isnan(values).any() or np.ptp(values) == 0 or np.ptp(change) == 0:
        return Estimate(np.nan, np.nan, np.nan, len(values), None)
    rho = float(stats.spearmanr(values, change).statistic)
    if abs(rho) > 1 - 1e-12:  # of very few pairs: it has no interval
        return Estimate(rho, np.nan, np.nan, len(values), None)
    error = np.sqrt((1 + rho**2 / 2) / (len(values) - 3))
    spread = stats.norm.ppf((1 + CONFIDENCE_LEVEL) / 2) * error
    low, high = np.tanh(np.arctanh(rho) + np.array([-spread, spread]))
    return Estimate(rho, float(low), float(high), len(values), "Fisher's z")


def displacement_figure(arms: Mapping[str, pa.Table], sign: str) -> Figure:
    """The mean change of log π(y_w | x) in each tenth of the pairs by a sign, one line per arm."""
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


def _changes_section(rows: Sequence[dict[str, Any]]) -> PageSection:
    """How many preferred responses became less likely, by how much, and the rejected ones."""
    text = [
        "The change is log π of a response under the trained model, less log π under the reference model: of "
        "every prepared pair, mean over the seeds. Lowest and highest CHES: y_w of that tenth of the pairs."
    ]
    numbers = {
        "change": "y_w, nats",
        "change_rejected": "y_l, nats",
        "lowest_ches": "lowest CHES",
        "highest_ches": "highest CHES",
    }
    cells = [
        (
            f"{row['arm']}, {row['group']}",
            f"{row['pairs']:,}",
            _number(row, "fell", 100, ".1f"),
            *(_number(row, name, 1, "+.2f") for name in numbers),
        )
        for row in rows
    ]
    headings = ("", "pairs", "y_w less likely, %", *numbers.values())
    return PageSection(
        "Change of log π(y_w | x)", text, [PageTable(headings, cells, "95 % intervals over pairs.")]
    )


def _signs_section(rows: Sequence[dict[str, Any]], arms: Mapping[str, pa.Table]) -> PageSection:
    """How the change of the preferred responses correlates with the `SIGNS`."""
    text = [
        "Spearman's ρ of the change of log π(y_w | x) and a quantity that the reference model gives for the "
        "pair before the training. Below zero: the higher the quantity, the less likely y_w becomes."
    ]
    cells = [
        (f"{row['arm']}, {row['group']}", *(_number(row, sign, 1, "+.2f") for sign in SIGNS)) for row in rows
    ]
    pictures = [
        Picture(
            f"displacement-{sign}", displacement_figure(arms, sign), f"By {written}, with 95 % intervals."
        )
        for sign, written in SIGNS.items()
        if all(pairs[sign].null_count == 0 for pairs in arms.values())
    ]
    table = PageTable(("ρ", *SIGNS.values()), cells, "95 % intervals over pairs.")
    return PageSection("Correlation with the reference model", text, [table], pictures)


def _number(row: Mapping[str, Any], key: str, scale: float, form: str) -> str:
    value, low, high = (scale * row[f"{key}{end}"] for end in ENDS)
    interval = "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"
    return "" if math.isnan(value) else f"{value:{form}}{interval}"


def displacement_finding(pairs: Mapping[str, pa.Table]) -> Finding:
    """The table and the sections of the `displaced_pairs` of each arm."""
    rows = [{"arm": arm, **row} for arm, changed in pairs.items() for row in displacement(changed)]
    sections = [_changes_section(rows), _signs_section(rows, pairs)]
    return Finding("displacement", pa.Table.from_pylist(rows), sections)


def _findings(run: RunDir, trained: Sequence[Job]) -> list[Finding]:
    """The displacement of each arm whose trained models have scored the pairs."""
    after = trained_scores(trained)
    if not after:
        return []
    before = finished_scores(run)[1]
    return [displacement_finding({arm: displaced_pairs(before, scores) for arm, scores in after.items()})]


def _arms(config: Config) -> tuple[Arm, ...]:
    return tuple(Arm(name, method_params(name, config)) for name in ("dpo", "bdpo"))


DISPLACEMENT = Experiment(
    "Likelihood displacement",
    "Which preferred responses become less likely in training, and could the reference model tell?",
    _arms,
    rescores=True,
    findings=_findings,
)
