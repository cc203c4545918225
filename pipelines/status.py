"""The progress of a run: rows, shards, steps, checkpoints, verdicts.

    python -m pipelines.status RUN_DIR [--json]

Reads the run folder, local or in a bucket, and nothing else: no cluster, no GPU, and a run at work is not
disturbed. A line names the command that is at work in the folder, and whether it is alive. --json prints one
line, a list of stages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.table import Table

from bdpo.cluster.status import StageStatus, command_line
from bdpo.storage.run_dir import RunDir, run_config
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.progress import console
from pipelines.runtime.registry import ATTACKS, PIPELINE, STUDIES

_COLOURS = {"done": "green", "begun": "yellow", "not begun": "dim"}


def run_status(run: RunDir) -> list[StageStatus]:
    """The stages of a run folder in their order, those of the pipeline first, attacks last.

    A folder with a search or an experiment may have no training of its own: a stage of the pipeline that is
    not begun is left out there.

    Raises:
        UserError: there is no run in the folder.
    """
    config = run_config(run)
    pipeline, studies, attacks = (
        [stage.status() for kind in kinds for stage in kind.found_in(config, run)]
        for kinds in (PIPELINE, STUDIES, ATTACKS)
    )
    pipeline = [status for status in pipeline if status.state != "not begun" or not studies]
    return pipeline + studies + attacks


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit 0, or 2 if there is no run in the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run_dir of the run")
    parser.add_argument("--json", action="store_true", help="for machines")
    given = parser.parse_args(arguments)
    with exit_codes():
        stages = run_status(RunDir(given.run_dir))
        if given.json:
            print(json.dumps([stage.as_json() for stage in stages]))
        else:
            console.print(_table(given.run_dir, stages))
            command = command_line(RunDir(given.run_dir))
            if command is not None:
                console.print(command, soft_wrap=True)


def _table(title: str, stages: list[StageStatus]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("stage", "state", "what there is"):
        table.add_column(heading)
    for stage in stages:
        facts = ", ".join(f"{name} {_shown(fact)}" for name, fact in stage.facts.items())
        table.add_row(stage.stage, f"[{_COLOURS[stage.state]}]{stage.state}[/]", facts)
    return table


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
