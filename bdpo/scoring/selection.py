"""What a method requires of the prepared pairs, and the rows that it is trained on.

A method with a reference requires scores; a method without one requires only the numbers of tokens, which
are counted here. SafeDPO requires a safety label for every response, and cannot use a pair of two unsafe
responses. `data.select` keeps a part of the pairs by their scores.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config import Config
from bdpo.data.formats.columns import LABELS
from bdpo.data.pairs import ID_COLUMNS, all_pairs, count_pairs
from bdpo.errors import UserError
from bdpo.scoring.scores import SCORE_SCHEMA, read_scores
from bdpo.storage.records import prepared_rows
from bdpo.storage.run_dir import RunDir


def requires_scores(config: Config) -> bool:
    """Whether the reference model has to score the pairs before training."""
    select = config.data.select
    return config.method.requires_reference or (select is not None and select.requires_scores)


def training_rows(config: Config, run: RunDir) -> pa.Table:
    """Rows of SCORE_SCHEMA, those of the pairs that are trained on, in the order of the pairs.

    Where no scores are required, only ids, groups and numbers of tokens are not null.

    Raises:
        UserError: the method requires scores that are not finished, or safety labels that are missing; or
            it can use none of the pairs.
    """
    require_labels(config, run)
    rows, keep = _selected_rows(config, run)
    if config.method.requires_safety_labels:
        labels = _labels(run)
        keep &= pc.or_(labels["chosen_safe"], labels["rejected_safe"]).to_numpy()
    rows = rows.filter(pa.array(keep))
    if not rows.num_rows:
        part = "of those that data.select keeps " if config.data.select else ""
        raise UserError(
            f"method.name={config.method.name}: both responses are unsafe in every pair {part}of "
            f"data.path={config.data.names}, none is left to train on"
        )
    return rows


def _selected_rows(config: Config, run: RunDir) -> tuple[pa.Table, np.ndarray]:
    """Rows of SCORE_SCHEMA of all prepared pairs, and which of them `data.select` keeps."""
    rows = read_scores(config, run) if requires_scores(config) else count_tokens(run)
    return rows, selected(config, rows)


def selected(config: Config, scores: pa.Table) -> np.ndarray:
    """Which rows `data.select` keeps, bool, shape (pairs,).

    Each bound is one on the rank within the group, so [0, 0.5] and [0.5, 1] share no pair and leave none.

    Raises:
        UserError: `select.ches` is set, which the scores of this architecture lack; or no pair is left.
    """
    keep, select = np.ones(scores.num_rows, dtype=bool), config.data.select
    if select is None:
        return keep
    if select.ches and scores["ches"].null_count:
        raise UserError(
            f"data.select.ches: {config.model.name_or_path} is of an architecture without CHES; "
            "select by mi_difference"
        )
    groups = np.array(scores["group"].to_pylist(), dtype=object)
    if select.group:
        keep = groups == select.group
    mi_chosen, mi_rejected = (scores[f"mi_{side}"].to_numpy() for side in ("chosen", "rejected"))
    for values, part in ((abs(mi_chosen - mi_rejected), select.mi_difference), (scores["ches"], select.ches)):
        if part:
            for group in ("safe", "unsafe", None):
                rows = np.flatnonzero(groups == group)
                ranked = rows[np.argsort(np.asarray(values)[rows], kind="stable")]
                low, high = (round(bound * len(rows)) for bound in part)
                keep[ranked[:low]] = keep[ranked[high:]] = False
    if not keep.any():
        raise UserError(f"data.select: none of the {len(keep)} pairs is left to train on")
    return keep


def require_labels(config: Config, run: RunDir) -> None:
    """Raise a UserError if the method requires safety labels and some of the prepared pairs have none."""
    if config.method.requires_safety_labels:
        labels = _labels(run)
        unlabelled = pc.sum(pc.or_(*(labels[name].is_null() for name in LABELS))).as_py()
        if unlabelled:
            raise UserError(
                f"method.name={config.method.name}: requires {' and '.join(LABELS)} of every pair, "
                f"{unlabelled} of {labels.num_rows} in data.path={config.data.names} lack them; use data "
                "with safety labels (data.format=pku_saferlhf has them), or another method"
            )


def require_benign_pairs(config: Config, run: RunDir) -> None:
    """Raise a UserError if a tamper test is to train on the run's own safe queries and there are none."""
    if config.tamper and config.tamper.data is None:
        account = prepared_rows(run)
        if account is None or not account["groups"].get("safe"):
            raise UserError(
                f"tamper: no pair of data.path={config.data.names} has group=safe; name benign data in "
                "tamper.data.path"
            )


def safety_account(config: Config, run: RunDir) -> dict[str, int]:
    """How many pairs are kept, swapped and dropped by their safety labels, of those that `data.select` keeps.

    Empty if the method requires no labels.
    """
    if not config.method.requires_safety_labels:
        return {}
    _, keep = _selected_rows(config, run)
    labels = _labels(run).filter(pa.array(keep))
    chosen, rejected = (labels[name].to_numpy() for name in LABELS)
    return {
        "kept": int(chosen.sum()),
        "swapped": int((~chosen & rejected).sum()),
        "dropped": int((~chosen & ~rejected).sum()),
    }


def pairs_account(run: RunDir, rows: pa.Table) -> dict[str, int]:
    """How many pairs are prepared, how many of them are trained on (`rows`), and of which groups."""
    groups = Counter(rows["group"].to_pylist())
    of_group = {f"trained on, {group or 'no group'}": groups[group] for group in ("safe", "unsafe", None)}
    return {
        "prepared": count_pairs(run.pairs),
        "trained on": rows.num_rows,
        **{name: count for name, count in of_group.items() if count},
    }


def count_tokens(run: RunDir) -> pa.Table:
    """Rows of SCORE_SCHEMA without scores: what is known of the pairs without a model."""
    pairs = all_pairs(run.pairs, ["pair_id", "group", *ID_COLUMNS])
    lengths = {name.replace("_ids", "_tokens"): pc.list_value_length(pairs[name]) for name in ID_COLUMNS}
    known = {"pair_id": pairs["pair_id"], "group": pairs["group"], **lengths}
    unknown = {name: pa.nulls(pairs.num_rows) for name in SCORE_SCHEMA.names if name not in known}
    return pa.table({**known, **unknown}).select(SCORE_SCHEMA.names).cast(SCORE_SCHEMA)


def _labels(run: RunDir) -> pa.Table:
    return all_pairs(run.pairs, [*LABELS])
