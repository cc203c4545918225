"""The trainings of an experiment: each arm at each seed, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from bdpo.config import Config
from bdpo.config.derive import part_of
from bdpo.evaluation.answers import prompts_fingerprint
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.evaluation.reference import reference_fingerprint
from bdpo.evaluation.results import asked_and_judged, is_valid, missing_capability
from bdpo.experiments.arms import Arm, arm_run, rescored
from bdpo.scoring.scores import finished_scores
from bdpo.storage.manifests import read_manifest, require_same_fingerprint
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import End, Failure, read_failure


@dataclass(frozen=True)
class Job:
    """One training of an arm, and its evaluation."""

    arm: str
    seed: int
    config: Config
    run: RunDir
    rescores: bool = False
    """Whether the trained model scores the pairs as well, see `arms.rescored`."""

    @property
    def name(self) -> str:
        """`bdpo, seed 0`."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether the model is trained and its evaluation valid; what `not_run` names may be missing."""
        return self.run.has_model() and is_valid(self.run.eval("trained"))

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.done and not self.not_run()

    @property
    def failure(self) -> Failure | None:
        """Why the job has no result, if that is recorded."""
        return read_failure(self.run.root)

    @property
    def end(self) -> End:
        """How the job ended, or OPEN."""
        if self.done:
            return End.COMPLETED
        failure = self.failure
        return failure.end if failure else End.OPEN

    def not_run(self) -> list[str]:
        """What is missing besides the evaluation: capability benchmarks, the scoring by the trained model."""
        missing = missing_capability(self.run.eval("trained"), self.config.evaluate.capability)
        _, run = rescored(self.config, self.run)
        if self.rescores and read_manifest(run.scores / "manifest.json") is None:
            missing.append("the scoring by the trained model")
        return missing

    def refuse_other_evaluation(self) -> None:
        """Make sure that an evaluation in the job's folder asked the prompts and the judge of this config.

        Raises:
            UserError: it did not; the message names the first difference.
        """
        verdicts = self.run.eval("trained") / "summary.json"
        summary = read_manifest(verdicts)
        if summary is not None:
            # The weights are those of the training's manifest: they need not be read again.
            asked = prompts_fingerprint(self.config) | judge_fingerprint(self.config)
            asked |= reference_fingerprint(self.config)
            require_same_fingerprint(verdicts, *map(asked_and_judged, (summary.fingerprint, asked)))

    def progress(self) -> str:
        """How the job ended; of an open one what it is doing."""
        if self.end != End.OPEN:
            return str(self.end)
        if self.run.has_model():
            return "evaluating"
        rows = MetricsLog(self.run.metrics).read()
        return f"step {len(rows)}" if rows else "begun" if self.run.config.exists() else "waiting"


def jobs_of(
    config: Config, run: RunDir, arms: Sequence[Arm], seeds: Sequence[int], rescores: bool = False
) -> list[Job]:
    """Each arm at each seed."""
    return [Job(arm.name, seed, *arm_run(config, run, arm, seed), rescores) for arm in arms for seed in seeds]


def rate_jobs(config: Config, run: RunDir, trials: Sequence[Arm]) -> list[Job]:
    """The arms of a search for learning rates: at the first seed, on the prompts of a search."""
    return jobs_of(part_of(config, "search"), run, trials, config.experiment.seeds[:1])


def trained_scores(jobs: Sequence[Job]) -> dict[str, list[pa.Table]]:
    """The pairs of each arm as its trained models scored them, a table for each job that has done so.

    Of an experiment with `rescores`. The columns are those of the scores of a run, so `ref_…` is the log-prob
    of the model that scored: here the trained one.
    """
    found = dict[str, list[pa.Table]]()
    for job in jobs:
        _, run = rescored(job.config, job.run)
        if (run.scores / "manifest.json").is_file():
            found.setdefault(job.arm, []).append(finished_scores(run)[1])
    return found
