"""The page of a run or of an experiment: what was run, on which data, the results and what they cost.

    python -m pipelines.report RUN_DIR
    python -m pipelines.report RUN_DIR/experiments/NAME

Writes <run_dir>/report/report.html with its figures and tables, or those of the experiment into its folder,
from what lies there, finished or not, local or in a bucket; no cluster, no GPU, and a run at work is not
disturbed. The folder of an arm of an experiment, or of a trial of a search, has a page as a run has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from bdpo.cluster.status import StageStatus
from bdpo.config import Config
from bdpo.data.account import account_line
from bdpo.errors import UserError
from bdpo.evaluation.results import finished_models, read_evaluation
from bdpo.reports.cost import TimedStage, stage_costs
from bdpo.scoring.scores import read_scores
from bdpo.scoring.selection import requires_scores
from bdpo.storage.manifests import read_facts
from bdpo.storage.paths import StoragePath, update
from bdpo.storage.records import prepared_rows
from bdpo.storage.run_dir import RunDir, run_config
from pipelines.attack import ATTACKS
from pipelines.evaluate import print_comparison
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.progress import console
from pipelines.runtime.stage import ManifestStage, Stage
from pipelines.runtime.stages import STAGES


class Report(Stage):
    """Sums a run up: tables on the terminal, summary.json, and the page; what stays the same is left."""

    name = "report"

    @property
    def _page(self) -> StoragePath:
        return self.run.report / "report.html"

    def outputs(self) -> list[StoragePath]:
        """Page, figures, tables and summary."""
        return [self.run.report]

    def complete(self) -> None:
        """Print and write the results of the finished stages."""
        config, run = self.config, self.run
        account = prepared_rows(run)
        evaluated = finished_models(run)
        mi = self._mutual_information()
        seconds = self._seconds()
        evaluations = {name: _recorded(folder) for name, folder in evaluated.items()}
        summary = {"data": account or {}, "mi": mi, "seconds": seconds, "evaluations": evaluations}
        update(run.report / "summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
        console.print()
        print_comparison(evaluated)
        if mi:
            console.print(_mi_table(mi))
        if account:
            console.print(f"data      {account_line(account)}")
        console.print("seconds   " + ", ".join(f"{stage} {spent:.0f}" for stage, spent in seconds.items()))
        write_run_page(config, run)
        console.print(f"report    {self._page}, summary.json, *.png; model {run.model}", soft_wrap=True)

    def status(self) -> StageStatus:
        """Whether there is a page."""
        return StageStatus.of(self.name, self._page.is_file(), begun=False)

    def _mutual_information(self) -> list[dict[str, Any]]:
        from bdpo.reports.scores import mi_summary

        if not requires_scores(self.config):
            return []
        return [asdict(row) for row in mi_summary(read_scores(self.config, self.run), self.config.method)]

    def _seconds(self) -> dict[str, float]:
        """What each finished stage took."""
        costs = stage_costs(timed_stages(self.config, self.run))
        return {cost.name: cost.seconds for cost in costs}


def _recorded(folder: StoragePath) -> Mapping[str, Any]:
    """The facts in a model's summary.json, with its capability."""
    capability = read_evaluation(folder).summary.capability
    more = {"capability": {name: asdict(result) for name, result in capability.items()}} if capability else {}
    return {**read_facts(folder / "summary.json"), **more}


def timed_stages(config: Config, run: RunDir) -> list[TimedStage]:
    """The stages of a run that record their seconds, finished or not, its attacks among them."""
    kinds: tuple[type[ManifestStage], ...] = (*STAGES, *ATTACKS)
    return [stage.timed() for kind in kinds for stage in kind.found_in(config, run)]


def write_run_page(config: Config, run: RunDir) -> None:
    """Write the page of a run folder; `config` is that of its last command."""
    from bdpo.reports.page import write_page
    from bdpo.reports.run import run_page, trained_config

    stages = timed_stages(trained_config(config, run), run)
    write_page(run_page(config, run, stages), run.report / "report.html")


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit 0, or 2 if the folder has neither a run nor an experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="the run_dir of a run, or an experiment in it")
    given = parser.parse_args(arguments)
    with exit_codes():
        write_report(RunDir(given.folder).root)


def write_report(root: StoragePath) -> None:
    """Write the page of the run or the experiment in a folder.

    Raises:
        UserError: the folder has neither.
    """
    from bdpo.experiments.arms import RECORD, run_at
    from pipelines.runtime.experiment_results import write_results

    if (root / RECORD).is_file():
        write_results(RunDir(root.parent.parent), root.name)
    elif not (root / "config.yaml").is_file():
        raise UserError(f"{root}: no run folder (no config.yaml) and no experiment (no {RECORD})")
    else:
        run = run_at(root)
        write_run_page(run_config(run), run)
        console.print(f"report    {run.report}/report.html, *.png, *.csv", soft_wrap=True)


if __name__ == "__main__":
    main()
