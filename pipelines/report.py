"""The page of a run or of an experiment: what was run, on which data, what came of it and what it cost.

    python -m pipelines.report RUN_DIR
    python -m pipelines.report RUN_DIR/experiments/NAME

Writes <run_dir>/report/report.html with its figures and tables, or those of the experiment into its folder,
from what lies there, finished or not, local or in a bucket; no cluster, no GPU, and a run at work is not
disturbed. The folder of an arm of an experiment, or of a trial of a search, has a page as a run has.
"""

from __future__ import annotations

import argparse

from bdpo.errors import UserError
from bdpo.experiments.arms import RECORD, run_at
from bdpo.reports.page import write_page
from bdpo.reports.run import run_page
from bdpo.storage.run_dir import RunDir, run_config
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.experiment_results import write_results
from pipelines.runtime.progress import console


def main() -> None:
    """Exit 0, or 2 if there is neither in the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="the run_dir of a run, or an experiment in it")
    with exit_codes():
        root = RunDir(parser.parse_args().folder).root
        if (root / RECORD).is_file():
            write_results(RunDir(root.parent.parent), root.name)
        elif not (root / "config.yaml").is_file():
            raise UserError(f"{root}: no run folder (no config.yaml) and no experiment (no {RECORD})")
        else:
            run = run_at(root)
            write_page(run_page(run_config(run), run), run.report / "report.html")
            console.print(f"report    {run.report}/report.html, *.png, *.csv", soft_wrap=True)


if __name__ == "__main__":
    main()
