"""What a run shows for itself: the mutual information of its pairs, as numbers and as a figure."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa

from bdpo.config import MethodConfig
from bdpo.storage import StoragePath, write_bytes

GROUPS = ("safe", "unsafe", None)
_COLOURS = {"safe": "#0072b2", "unsafe": "#d55e00", None: "#555555"}  # told apart by every eye (Okabe, Ito)
_POINTS = 4000


def mi_summary(scores: pa.Table, method: MethodConfig) -> list[dict[str, Any]]:
    """One row a group of pairs: number, mean MI of both responses (nats per token), and shares.

    `chosen_better` is the share of pairs whose chosen response is better understood; `floored` the share
    of responses whose MI is below `mi_floor`.
    """
    rows = []
    for group, chosen, rejected in _by_group(scores):
        rows.append(
            {
                "group": group,
                "pairs": len(chosen),
                "mi_chosen": float(chosen.mean()),
                "mi_rejected": float(rejected.mean()),
                "chosen_better": float((chosen > rejected).mean()),
                "floored": float((np.concatenate([chosen, rejected]) < np.float32(method.mi_floor)).mean()),
            }
        )
    return rows


def mi_scatter(scores: pa.Table, file: StoragePath) -> None:
    """Figure 2 of the paper: MI of the rejected against the chosen response, a colour for each group.

    Of many pairs only a fixed number is drawn, always the same ones.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for group, chosen, rejected in _by_group(scores):
        shown = np.random.default_rng(0).permutation(len(chosen))[:_POINTS]
        label = f"{group or 'all'} queries ({len(chosen)})"
        axes.scatter(chosen[shown], rejected[shown], s=9, alpha=0.45, lw=0, c=_COLOURS[group], label=label)
    axes.axline((0, 0), slope=1, c="black", lw=0.8, ls="--", label="equally understood")
    axes.set(
        xlabel="MI of the preferred response (nats per token)",
        ylabel="MI of the dispreferred response (nats per token)",
        title="What the reference model already understands",
        aspect="equal",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160, format=file.suffix[1:])
    write_bytes(file, picture.getvalue())


def _by_group(scores: pa.Table) -> list[tuple[str | None, np.ndarray, np.ndarray]]:
    """(group, mi_chosen, mi_rejected) of every group that has pairs."""
    groups = np.array(scores["group"].to_pylist(), dtype=object)
    chosen, rejected = scores["mi_chosen"].to_numpy(), scores["mi_rejected"].to_numpy()
    masks = [(group, groups == group) for group in GROUPS]
    return [(group, chosen[mask], rejected[mask]) for group, mask in masks if mask.any()]
