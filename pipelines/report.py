"""The page of a run: what was run, on which data, what came of it and what it cost.

    python -m pipelines.report RUN_DIR

Writes <run_dir>/report/report.html and its figures from what lies in the run folder, finished or not, local
or in a bucket; no cluster, no GPU, and a run at work is not disturbed.
"""

from __future__ import annotations

import argparse

from bdpo.page import write_page
from bdpo.report import run_page
from bdpo.runs import RunDir
from bdpo.status import run_config
from pipelines.cli import console, exit_codes


def main() -> None:
    """Exit 0, or 2 if there is no run in the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run_dir of the run")
    with exit_codes():
        run = RunDir(parser.parse_args().run_dir)
        write_page(run_page(run_config(run), run), run.report / "report.html")
    console.print(f"report    {run.report}/report.html, *.png", soft_wrap=True)


if __name__ == "__main__":
    main()
