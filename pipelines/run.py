"""The whole pipeline: prepare, score, evaluate the base, train, evaluate the trained model, report.

    python -m pipelines.run --config pipelines/configs/sandbox.yaml [section.key=value ...]

Every stage resumes where it stopped and is skipped when it is done. The result is a table on the
terminal, and a page: <run_dir>/report/report.html. Methods without a reference (cpo, simpo) have nothing to
score.
"""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from bdpo.cluster.preflight import INPUT_CHECKS
from bdpo.config import Config
from bdpo.reports.page import write_page
from bdpo.reports.run import run_page
from bdpo.reports.scores import mi_summary
from bdpo.scoring.scores import read_scores
from bdpo.scoring.selection import wants_scores
from bdpo.storage.manifests import read_manifest
from bdpo.storage.paths import write_text
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import evaluate_model, print_comparison
from pipelines.preflight import refuse_what_does_not_fit
from pipelines.prepare import account_line, run_prepare
from pipelines.runtime.cli import main
from pipelines.runtime.plan_table import require_memory
from pipelines.runtime.progress import console
from pipelines.score import score_prepared
from pipelines.train import run_train


def run_all(config: Config, run: RunDir) -> None:
    """Run every stage that is not done, then print and write the report."""
    _preflight(config, run)
    score = score_prepared(config, run) if wants_scores(config) else None
    base = _evaluated(config, run, "base")
    train = run_train(config, run)
    trained = _evaluated(config, run, "trained")
    stages = {"score": score, "evaluate base": base, "train": train, "evaluate trained": trained}
    seconds = {stage: manifest["seconds"] for stage, manifest in stages.items() if manifest}
    _report(config, run, {"base": base, "trained": trained}, seconds)


def _evaluated(config: Config, run: RunDir, name: str) -> dict[str, Any]:
    """The manifest of a model's evaluation, which is made unless it is there, with its capability."""
    summary = evaluate_model(config, run, name)
    manifest = read_manifest(run.eval(name) / "summary.json") or {}
    return manifest | ({"capability": summary.capability} if summary.capability else {})


def _preflight(config: Config, run: RunDir) -> None:
    """What would stop a later stage stops the run before its first."""
    for check in INPUT_CHECKS.values():
        check(config, run)
    run_prepare(config, run)
    if read_manifest(run.eval("trained") / "summary.json") is None:
        require_memory(config)
        refuse_what_does_not_fit(config, run)


def _report(
    config: Config, run: RunDir, evaluations: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> None:
    mi = []
    if "score" in seconds:
        scores = read_scores(config, run)
        mi = mi_summary(scores, config.method)
    data = read_manifest(run.data / "manifest.json")
    account = data["account"] if data else {}
    summary = {"data": account, "mi": mi, "seconds": seconds, "evaluations": evaluations}
    write_text(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print()
    print_comparison({name: run.eval(name) for name in evaluations})
    if mi:
        console.print(_mi_table(mi))
    console.print(f"data      {account_line(account)}")
    console.print("seconds   " + ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items()))
    write_page(run_page(config, run), run.report / "report.html")
    console.print(
        f"report    {run.report}/report.html, summary.json, *.png; model {run.model}", soft_wrap=True
    )


def _mi_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="mutual information, nats per token", title_justify="left")
    for heading in ("queries", "pairs", "chosen", "rejected", "chosen better", "floored"):
        table.add_column(heading, justify="left" if heading == "queries" else "right")
    for row in rows:
        table.add_row(
            row["group"] or "all",
            str(row["pairs"]),
            f"{row['chosen']['mean']:.3f}",
            f"{row['rejected']['mean']:.3f}",
            f"{row['chosen_better']:.0%}",
            f"{(row['chosen']['floored'] + row['rejected']['floored']) / 2:.0%}",
        )
    return table


if __name__ == "__main__":
    main(run_all, __doc__, RunDir.results)
