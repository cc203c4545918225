"""Where a run stands: rows, shards, steps, checkpoints, verdicts.

    python -m pipelines.status RUN_DIR [--json]

Reads the run folder, local or in a bucket, and nothing else: no cluster, no GPU, and a run at work is not
disturbed. --json prints one line, a list of stages.
"""

from __future__ import annotations

import argparse
import json

from rich.table import Table

from bdpo.cluster.status import Stage, run_status
from bdpo.storage.run_dir import RunDir
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.progress import console

_COLOURS = {"done": "green", "begun": "yellow", "not begun": "dim"}


def main() -> None:
    """Exit 0, or 2 if there is no run in the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run_dir of the run")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    with exit_codes():
        stages = run_status(RunDir(arguments.run_dir))
    if arguments.json:
        print(json.dumps(stages))
    else:
        console.print(_table(arguments.run_dir, stages))


def _table(title: str, stages: list[Stage]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("stage", "state", "what there is"):
        table.add_column(heading)
    for stage in stages:
        colour = _COLOURS[stage["state"]]
        facts = ", ".join(f"{key} {_shown(value)}" for key, value in list(stage.items())[2:])
        table.add_row(stage["stage"], f"[{colour}]{stage['state']}[/]", facts)
    return table


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
