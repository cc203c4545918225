"""The complete pipeline: all stages, from the preference pairs to the page with the results.

    python -m pipelines.run --config pipelines/configs/sandbox.yaml [section.key=value ...]

Every stage resumes where it stopped and is skipped when it is done. The result is a table on the
terminal, and a page: <run_dir>/report/report.html. docs/running.md lists the stages; which of them a run
has depends on its config. Methods without a reference, see docs/methods.md, require no scores.

`run_pipeline` is the same as a Python function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdpo.config import Config
from bdpo.evaluation.results import Evaluation, finished_models, read_evaluation
from bdpo.scoring.scores import finished_scores
from bdpo.scoring.selection import requires_scores
from bdpo.storage.paths import StoragePath
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import warn_of_screen
from pipelines.runtime.cli import Command
from pipelines.runtime.progress import silent_console
from pipelines.runtime.registry import PIPELINE
from pipelines.runtime.stage import complete_all

if TYPE_CHECKING:
    import pyarrow as pa


def run_all(config: Config, run: RunDir) -> None:
    """Complete every stage; what does not fit the cluster stops the run before anything runs there."""
    from pipelines.runtime.admission import refuse_what_does_not_fit
    from pipelines.runtime.plan_table import require_memory

    prepare, *others = [stage(config, run) for stage in PIPELINE]
    warn_of_screen(config)
    prepare.complete()
    if "trained" not in finished_models(run):
        require_memory(config)
        refuse_what_does_not_fit(config, run)
    complete_all(others)


main = Command(__doc__, PIPELINE, run_all)


@dataclass(frozen=True)
class RunResults:
    """What a finished run has in its folder."""

    folder: StoragePath
    """The run folder, `run_dir` of the config."""
    model: StoragePath
    """The folder of the trained model."""
    evaluations: Mapping[str, Evaluation]
    """`base`, `adapter`, `trained` and `tampered`, those that were evaluated: summary, scores and judge."""
    scores: pa.Table | None
    """A row a pair: log-probs in nats, mutual information in nats per token; None where none are required."""


def run_pipeline(config: Config) -> RunResults:
    """What `bdpo run` does: the missing stages of a run, which may start a Ray cluster. Prints nothing.

    `bdpo.config.load_config("my.yaml", ["method.alpha=1.5"])` reads a config. The same call again resumes,
    and reads the results when all is done. Ray and the libraries write to the log as they are set up to.

    Raises:
        UserError: config, input or environment is wrong, or another command works in the run folder.
        StorageUnavailable: object storage gave no answer within its limit.
        KeyboardInterrupt: SIGINT, or the lock of the run folder was lost.
    """
    with silent_console():
        main.complete(config)
    run = RunDir(config.run_dir)
    evaluations = {name: read_evaluation(folder) for name, folder in finished_models(run).items()}
    scores = finished_scores(run)[1] if requires_scores(config) else None
    return RunResults(run.root, run.model, evaluations, scores)


if __name__ == "__main__":
    main()
