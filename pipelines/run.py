"""The complete pipeline: all stages, from the preference pairs to the page with the results.

    python -m pipelines.run --config pipelines/configs/sandbox.yaml [section.key=value ...]

Every stage resumes where it stopped and is skipped when it is done. The result is a table on the
terminal, and a page: <run_dir>/report/report.html. docs/running.md lists the stages; which of them a run
has depends on its config. Methods without a reference, see docs/methods.md, require no scores.
"""

from __future__ import annotations

from bdpo.config import Config
from bdpo.evaluation.results import finished_models
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import warn_of_screen
from pipelines.runtime.cli import Command
from pipelines.runtime.registry import PIPELINE
from pipelines.runtime.stage import check_inputs, complete_all


def run_all(config: Config, run: RunDir) -> None:
    """Complete every stage; what would stop a later stage stops the run before its first."""
    from pipelines.runtime.admission import refuse_what_does_not_fit
    from pipelines.runtime.plan_table import require_memory

    prepare, *others = [stage(config, run) for stage in PIPELINE]
    check_inputs([prepare, *others])
    warn_of_screen(config)
    prepare.complete()
    if "trained" not in finished_models(run):
        require_memory(config)
        refuse_what_does_not_fit(config, run)
    complete_all(others)


main = Command(__doc__, PIPELINE, run_all)

if __name__ == "__main__":
    main()
