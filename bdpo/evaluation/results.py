"""Finished evaluations, read back from run folders to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bdpo.errors import UserError
from bdpo.evaluation.measures import Summary
from bdpo.storage.manifests import Fingerprint, read_facts, read_manifest
from bdpo.storage.paths import StoragePath, open_parquet, sorted_glob
from bdpo.storage.run_dir import RunDir

MODEL_NAMES = ("base", "adapter", "trained")

COMPARABLE = (
    "prompts",
    "evaluate.max_new_tokens",
    "evaluate.engine",
    "evaluate.temperature",
    "seed",
    "evaluate.judge",
    "evaluate.judge.model",
    "rubrics",
    "judge_weights",
    "phrases",
)


@dataclass(frozen=True)
class Evaluation:
    """One model's summary and scores; the scores are empty of what its summary calls invalid."""

    summary: Summary
    scores: pa.Table
    fingerprint: Fingerprint = field(default_factory=dict)


def read_evaluation(folder: StoragePath) -> Evaluation:
    """The evaluation in `<run_dir>/eval/<name>`.

    Scores of a benchmark that is invalid are left out: what is not fit to be shown is not fit to be compared.

    Raises:
        UserError: it is not finished.
    """
    manifest = read_manifest(folder / "summary.json")
    if manifest is None:
        raise UserError(f"{folder}: no finished evaluation; run `python -m pipelines.evaluate` first")
    capability = {file.stem: read_facts(file) for file in sorted_glob(folder / "capability", "*.json")}
    summary = replace(Summary.from_json(manifest), capability=capability)
    valid = [name for name, part in summary.benchmarks.items() if part.valid]
    scores = pq.read_table(open_parquet(folder / "scores.parquet"))
    scores = scores.filter(pc.is_in(scores["benchmark"], pa.array(valid, pa.string())))
    return Evaluation(summary, scores, manifest.fingerprint)


def chosen_models(roots: Sequence[str | StoragePath]) -> dict[str, StoragePath]:
    """Column name -> evaluation folder: `base` of the first run, and of each run the model it is about.

    That is the trained model, else the adapter, else the base; its column is called after the run folder.

    Raises:
        UserError: fewer than two runs, one without evaluation, two of one name, or two that cannot be
            compared, because prompts, lengths, engines or judges differ.
    """
    if len(roots) < 2:
        raise UserError("--compare wants two run folders or more")
    chosen: dict[str, StoragePath] = {}
    for root in roots:
        run = RunDir(root)
        there = [name for name in MODEL_NAMES if (run.eval(name) / "summary.json").is_file()]
        if not there:
            raise UserError(f"{root}: no finished evaluation; run `python -m pipelines.evaluate` first")
        if there[-1] != "base" and there[0] == "base" and not chosen:
            chosen["base"] = run.eval("base")
        if run.root.name in chosen:
            raise UserError(f"{root}: two columns would be called {run.root.name}; rename a run folder")
        chosen[run.root.name] = run.eval(there[-1])
    _refuse_incomparable(list(chosen.values()))
    return chosen


def _refuse_incomparable(folders: list[StoragePath]) -> None:
    fingerprints = [read_evaluation(folder).fingerprint for folder in folders]
    for folder, fingerprint in zip(folders, fingerprints, strict=True):
        for name in COMPARABLE:
            if fingerprint.get(name) != fingerprints[0].get(name):
                raise UserError(
                    f"{folder}: made with other {name} than {folders[0]}, which cannot be compared"
                )
