"""What the manifests of a run folder record of its rows and of its training, as types."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NotRequired, TypedDict, cast

from bdpo.storage.manifests import read_facts, read_manifest
from bdpo.storage.metrics_log import Row
from bdpo.storage.run_dir import RunDir

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "pyarrow")


def versions() -> dict[str, str]:
    """The versions of Python and of `PACKAGES`, "missing" for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


class SourceRows(TypedDict):
    """The account of a data set; `quarantined` and `excluded` have the number of rows of each reason."""

    source: str
    format: str
    rows: int
    kept: int
    quarantined: dict[str, int]
    excluded: dict[str, int]
    not_sampled: int
    unread_columns: list[str]
    unread_files: list[str]
    changed_by_template: int


class PreparedRows(SourceRows):
    """The account of all data sets of a run; `sources` has that of each where there are several."""

    groups: dict[str, int]
    sources: NotRequired[list[SourceRows]]


def prepared_rows(run: RunDir) -> PreparedRows | None:
    """The account in a run folder; None before its pairs are prepared."""
    manifest = read_manifest(run.data / "manifest.json")
    return cast(PreparedRows, manifest["account"]) if manifest else None


def prepared_pairs(run: RunDir) -> int | None:
    """How many pairs are prepared; None before that."""
    account = prepared_rows(run)
    return account["kept"] if account else None


def account_notes(account: PreparedRows) -> list[str]:
    """What of the data sets has no effect, a phrase each: columns, files, and text that the template changed.

    What an earlier version did not record is left out.
    """
    unread = {"columns": account.get("unread_columns"), "files": account.get("unread_files")}
    notes = [f"{kind} not read: {', '.join(names)}" for kind, names in unread.items() if names]
    if changed := account.get("changed_by_template"):
        notes.append(f"the chat template changed the text of {changed} kept rows")
    return notes


@dataclass(frozen=True)
class TrainingRecord:
    """A finished training; what an earlier version did not record is empty.

    `last` is the last row of the metrics. `pairs` and `safety` have the number of pairs by what happened to
    them, by group and by safety labels.
    """

    steps: int
    seconds: float
    last: Row = field(default_factory=dict)
    recoveries: list[Row] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=dict)
    safety: dict[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    """Digest of the weights that the training began with."""


def training_record(run: RunDir) -> TrainingRecord | None:
    """The record of the training in a run folder; None before its end."""
    facts = read_facts(run.train / "manifest.json")
    known = {each.name: facts[each.name] for each in fields(TrainingRecord) if each.name in facts}
    return TrainingRecord(**known) if facts else None
