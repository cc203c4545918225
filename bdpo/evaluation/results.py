"""Finished evaluations, read back from run folders to be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc

from bdpo.config.evaluate import AlignedName, ModelName
from bdpo.errors import UserError
from bdpo.evaluation.capability import NOT_RUN, read_result
from bdpo.evaluation.judges.registry import NOBODY, JudgeNote
from bdpo.evaluation.measures import Summary
from bdpo.storage.manifests import Fingerprint, read_facts, read_manifest
from bdpo.storage.paths import StoragePath, read_parquet, sorted_glob
from bdpo.storage.run_dir import RunDir

MODEL_FIELDS = frozenset(
    {"weights", "tokenizer", "chat_template", "template_kwargs", "dtype", "adapter", "reference"}
)
"""The fields of a fingerprint that are the evaluated model's, see `EvaluatedModel.fingerprint`, or its base's
(`reference`)."""


def asked_and_judged(fingerprint: Fingerprint) -> Fingerprint:
    """The fields of an evaluation's fingerprint that are not its model's: prompts, how they are answered, and
    all that the judge declares. Two evaluations can be compared if these are equal."""
    return {name: value for name, value in fingerprint.items() if name not in MODEL_FIELDS}


def incomparable_field(first: Fingerprint, second: Fingerprint) -> str | None:
    """The first field, not of the models, in which two evaluations differ; None if they can be compared."""
    one, other = asked_and_judged(first), asked_and_judged(second)
    return next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)


def is_finished(folder: StoragePath) -> bool:
    """Whether the evaluation in `<run_dir>/eval/<name>` is finished, valid or not."""
    return all((folder / name).is_file() for name in ("summary.json", "scores.parquet"))


def is_valid(folder: StoragePath) -> bool:
    """Whether it is finished, with enough verdicts; capability benchmarks may be missing."""
    return is_finished(folder) and bool(read_facts(folder / "summary.json").get("valid"))


def missing_capability(folder: StoragePath, names: Iterable[str]) -> list[str]:
    """Those of the capability benchmarks that have no result in `<run_dir>/eval/<name>`."""
    found = {name: read_manifest(folder / "capability" / f"{name}.json") for name in names}
    return [name for name, result in found.items() if result is None or NOT_RUN in result]


def finished_models(run: RunDir) -> dict[str, StoragePath]:
    """Name -> folder of each evaluation of a run that is finished, valid or not, in the order of tables."""
    folders = {name: run.eval(name) for name in get_args(ModelName)}
    return {name: folder for name, folder in folders.items() if is_finished(folder)}


@dataclass(frozen=True)
class Evaluation:
    """One model's summary and scores; the scores are empty of what its summary calls invalid."""

    summary: Summary
    scores: pa.Table
    fingerprint: Fingerprint = field(default_factory=dict)
    judge: JudgeNote = NOBODY
    """Who judged."""


def valid_scores(summary: Summary, scores: pa.Table) -> pa.Table:
    """The rows of the benchmarks that are valid."""
    valid = [name for name, part in summary.benchmarks.items() if part.valid]
    return scores.filter(pc.is_in(scores["benchmark"], pa.array(valid, pa.string())))


def read_evaluation(folder: StoragePath) -> Evaluation:
    """The evaluation in `<run_dir>/eval/<name>`.

    Scores of a benchmark that is invalid are left out: what is not fit to be shown is not fit to be compared.

    Raises:
        UserError: it is not finished.
    """
    manifest = read_manifest(folder / "summary.json")
    if manifest is None:
        raise UserError(f"{folder}: no finished evaluation; run `python -m pipelines.evaluate` first")
    files = sorted_glob(folder / "capability", "*.json")
    capability = {file.stem: read_result(read_facts(file)) for file in files}
    summary = replace(Summary.from_json(manifest), capability=capability)
    scores = valid_scores(summary, read_parquet(folder / "scores.parquet"))
    fingerprint = manifest.fingerprint
    judge = JudgeNote.of(fingerprint, manifest.get("judge_error", {}))
    return Evaluation(summary, scores, fingerprint, judge)


def chosen_models(roots: Sequence[str | StoragePath]) -> dict[str, StoragePath]:
    """`<run>/<model>` -> evaluation folder: the base of the first run, and of each run the model it is about.

    That is the trained model, else the adapter, else the base.

    Raises:
        UserError: fewer than two runs, one without evaluation, two of one name, or two that cannot be
            compared, because prompts, lengths, engines or judges differ.
    """
    if len(roots) < 2:
        raise UserError("--compare expects two run folders or more")
    chosen: dict[str, StoragePath] = {}
    names: set[str] = set()
    for root in roots:
        run = RunDir(root)
        there = [name for name in finished_models(run) if name in get_args(AlignedName)]
        if not there:
            raise UserError(f"{root}: no finished evaluation; run `python -m pipelines.evaluate` first")
        if run.root.name in names:
            raise UserError(f"{root}: two columns would be called {run.root.name}; rename a run folder")
        names.add(run.root.name)
        for name in dict.fromkeys([*(there[:1] if there[0] == "base" and not chosen else ()), there[-1]]):
            chosen[f"{run.root.name}/{name}"] = run.eval(name)
    _refuse_incomparable(list(chosen.values()))
    return chosen


def unlike_models(chosen: Iterable[str]) -> str | None:
    """A line that names the runs whose kind of model differs from that of the others; None if none does."""
    model_of = dict(name.rsplit("/", 1) for name in chosen)  # of each run the last one, which it is about
    if len(set(model_of.values())) < 2:
        return None
    return "not the same kind of model of each run: " + ", ".join(
        f"{m} of {run}" for run, m in model_of.items()
    )


def _refuse_incomparable(folders: list[StoragePath]) -> None:
    first, *others = folders
    made_with = read_evaluation(first).fingerprint
    for folder in others:
        if name := incomparable_field(made_with, read_evaluation(folder).fingerprint):
            raise UserError(f"{folder}: made with other {name} than {first}, which cannot be compared")
