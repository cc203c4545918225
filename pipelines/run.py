"""The whole pipeline: prepare, score, evaluate the base, train, evaluate the trained model, report.

    python -m pipelines.run --config pipelines/configs/sandbox.yaml [section.key=value ...]

Every stage resumes where it stopped and is skipped when it is done. The result is a table on the
terminal, <run_dir>/report/summary.json and <run_dir>/report/mi.png.
"""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from bdpo.config import Config
from bdpo.report import mi_scatter, mi_summary
from bdpo.runs import RunDir, read_manifest
from bdpo.scoring import read_scores
from bdpo.storage import write_text
from pipelines.cli import console, main
from pipelines.evaluate import evaluate_model, print_comparison
from pipelines.preflight import refuse_what_cannot_end_well
from pipelines.prepare import account_line
from pipelines.score import run_score
from pipelines.train import run_train


def run_all(config: Config, run: RunDir) -> None:
    """Run every stage that is not done, then print and write the report."""
    refuse_what_cannot_end_well(config, run)
    score = run_score(config, run)
    base = evaluate_model(config, run, "base")
    train = run_train(config, run)
    trained = evaluate_model(config, run, "trained")
    seconds = {
        "score": score["seconds"],
        "evaluate base": base["seconds"],
        "train": train["seconds"],
        "evaluate trained": trained["seconds"],
    }
    _report(config, run, {"base": base, "trained": trained}, seconds)


def _report(
    config: Config, run: RunDir, evaluations: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> None:
    scores = read_scores(config, run)
    mi = mi_summary(scores, config.method)
    mi_scatter(scores, run.report / "mi.png")
    data = read_manifest(run.data / "manifest.json")
    account = data["account"] if data else {}
    summary = {"data": account, "mi": mi, "seconds": seconds, "evaluations": evaluations}
    write_text(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print()
    print_comparison({name: run.eval(name) for name in evaluations})
    console.print(_mi_table(mi))
    console.print(f"data      {account_line(account)}")
    console.print("seconds   " + ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items()))
    console.print(f"report    {run.report}/summary.json, mi.png; model {run.model}", soft_wrap=True)


def _mi_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="mutual information, nats per token", title_justify="left")
    for heading in ("queries", "pairs", "chosen", "rejected", "chosen better", "floored"):
        table.add_column(heading, justify="left" if heading == "queries" else "right")
    for row in rows:
        table.add_row(
            row["group"] or "all",
            str(row["pairs"]),
            f"{row['mi_chosen']:.3f}",
            f"{row['mi_rejected']:.3f}",
            f"{row['chosen_better']:.0%}",
            f"{row['floored']:.0%}",
        )
    return table


if __name__ == "__main__":
    main(run_all, __doc__, RunDir.results)
