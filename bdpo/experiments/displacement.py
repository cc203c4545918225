"""Which preferred responses lose probability in training, and whether the reference model could tell.

Likelihood displacement: DPO widens the margin of a pair although log π(y_w | x) falls (Razin et al. 2024,
'Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization', which measures it
against CHES). Here it is measured against the mutual information too, which B-DPO goes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from bdpo.stats import CONFIDENCE_LEVEL, Estimate, mean_of_many, rate

SIGNS = {
    "ches": "CHES",
    "mi_chosen": "I_w",
    "mi_rejected": "I_l",
    "imbalance": "|I_w − I_l|",
}
"""What the reference model says of a pair before it is trained on, and how it is written."""

_BINS = 10


def displaced_pairs(before: pa.Table, after: Sequence[pa.Table]) -> pa.Table:
    """A row a pair: `group`, the `SIGNS`, and by how much its log-probs changed in nats, mean over models.

    `change` is of log π(y_w | x), `change_rejected` of log π(y_l | x).

    `before` are the scores of the reference model, `after` those of models that were trained from it, on the
    same pairs, in any order. What training held out or `data.select` left out is among the pairs too.

    Raises:
        ValueError: they are of other pairs.
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
    """A row a group, and one of all: how many pairs `fell`, mean changes, the correlations with signs.

    `change` and `change_rejected` are of all pairs; `lowest_ches` and `highest_ches` are the `change` of the
    tenth of the group's pairs with the lowest and the highest CHES. The correlations are Spearman's ρ of
    `change` and a sign. Each has `_low` and `_high`, 95 % over pairs. What is not known is nan: CHES of an
    architecture whose hidden states are not, ρ with a sign that is the same of all pairs.
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
    """The changes of the pairs in tenths by a sign, lowest first, fewer of few pairs; none if not known."""
    if pairs[sign].null_count:
        return []
    change = pairs["change"].to_numpy()[np.argsort(pairs[sign].to_numpy(), kind="stable")]
    return np.array_split(change, max(1, min(_BINS, len(change) // 2)))


def _spearman(sign: pa.ChunkedArray, change: np.ndarray) -> Estimate:
    """ρ and its interval by Fisher's z with the variance of Bonett & Wright (2000)."""
    values = sign.to_numpy(zero_copy_only=False).astype(float)
    if len(values) < 5 or np.isnan(values).any() or np.ptp(values) == 0 or np.ptp(change) == 0:
        return Estimate(np.nan, np.nan, np.nan, len(values), None)
    rho = float(stats.spearmanr(values, change).statistic)
    if abs(rho) > 1 - 1e-12:  # of ever so few pairs: it says nothing about others
        return Estimate(rho, np.nan, np.nan, len(values), None)
    error = np.sqrt((1 + rho**2 / 2) / (len(values) - 3))
    spread = stats.norm.ppf((1 + CONFIDENCE_LEVEL) / 2) * error
    low, high = np.tanh(np.arctanh(rho) + np.array([-spread, spread]))
    return Estimate(rho, float(low), float(high), len(values), "Fisher's z")
