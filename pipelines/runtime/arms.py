"""The arms of an experiment as the engine runs them: one rung, trained by Ray Train, then evaluated.

In some experiments the trained model then scores the pairs, as the reference model did, over a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from bdpo.evaluation.measures import Summary
from bdpo.experiments.arms import rescored
from bdpo.experiments.jobs import Job
from bdpo.storage.cache import drop_local_copy
from bdpo.storage.manifests import Fingerprint, finished
from bdpo.variants.ends import Failure, forget_failure, read_failure, write_failure
from bdpo.variants.objective import require_valid
from pipelines.evaluate import EvaluateTrained
from pipelines.runtime.pool import InProcess
from pipelines.runtime.stalls import watched_tasks
from pipelines.runtime.work_times import Begins
from pipelines.score import Score
from pipelines.train import Train, train_fingerprint

if TYPE_CHECKING:
    from pipelines.runtime.variant_protocol import Runner


@dataclass(frozen=True)
class Arms:
    """The jobs of an experiment; a small object that is sent to every process that runs one."""

    jobs: Sequence[Job]
    fingerprints: dict[str, Fingerprint]
    """The fingerprint of the training of each job, by the name of the job."""

    title = "arms"

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Arms:
        """The jobs, of which those that failed are open again if they are retried, see `Failure`.

        Raises:
            UserError: a job was begun or evaluated with another config; the message names the first
                difference.
        """
        arms = cls(jobs, {job.name: train_fingerprint(job.config, job.run) for job in jobs})
        for job in jobs:
            refuse_other(job, arms.fingerprints[job.name])
        for job in jobs:
            failure = read_failure(job.run.root, arms.fingerprints[job.name])
            if failure is None or failure.retried:
                forget_failure(job.run.root)
        return arms

    @property
    def todo(self) -> list[Job]:
        """The jobs that are not complete, and not known to fail."""
        return [job for job in self.jobs if not job.complete and job.failure is None]

    @property
    def failures(self) -> dict[str, Failure]:
        """Why jobs have no result, by the name of the job."""
        found = {job.name: job.failure for job in self.jobs}
        return {name: failure for name, failure in found.items() if failure is not None}

    def open_names(self) -> list[str]:
        """The names of the jobs that are to be run, or resumed."""
        return [job.name for job in self.todo]

    def missing(self) -> int:
        """Every job has a name from the beginning."""
        return 0

    def next_name(self) -> str:
        """There is no further job."""
        raise NotImplementedError

    def runner(self, name: str, begins: Begins) -> Runner:
        """What runs the job of this name."""
        return ArmRunner(self._job(name), begins)

    def is_promoted(self, name: str) -> bool:
        """No arm is stopped early."""
        return True

    def record_failure(self, name: str, failure: Failure) -> None:
        """Record that a job has no result."""
        write_failure(self._job(name).run.root, self.fingerprints[name], failure)

    def table(self) -> Table:
        """How far each arm is at each seed."""
        seeds = sorted({job.seed for job in self.jobs})
        table = Table("arm", *(f"seed {seed}" for seed in seeds))
        for arm in dict.fromkeys(job.arm for job in self.jobs):
            shown = {job.seed: job.progress() for job in self.jobs if job.arm == arm}
            table.add_row(arm, *(shown.get(seed, "") for seed in seeds))
        return table

    def _job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)


def refuse_other(job: Job, fingerprint: Fingerprint) -> None:
    """Make sure that a training, or an evaluation, in the job's folder was begun with the job's config.

    Raises:
        UserError: it was not; the message names the first difference.
    """
    for file in ("begun.json", "manifest.json"):
        finished(job.run.train / file, fingerprint)
    job.refuse_other_evaluation()


class ArmRunner:
    """Runs a job: Ray Train trains; then this process evaluates, or another one that holds a GPU meanwhile.

    This process holds no GPU itself, so a training may take all GPUs of the cluster.
    """

    def __init__(self, job: Job, begins: Begins) -> None:
        self.job, self.name, self.begins = job, job.name, begins

    def next_rung(self) -> bool:
        """Train the arm, evaluate it, and let it score the pairs if its experiment asks for that.

        What is done already is not done again.

        Raises:
            InvalidEvaluation: too many verdicts are missing; they alone are asked for when it is retried.
        """
        job = self.job
        job.run.record(job.config)
        Train(job.config, job.run).complete()
        gpus = job.config.evaluate.gpus_per_worker
        summary = _evaluate_on_gpu(gpus, job) if gpus else _evaluate(job, self.begins)
        require_valid("trained", summary)
        if job.rescores:
            Score(*rescored(job.config, job.run)).complete()
        return True

    def stop_training(self) -> None:
        """The training has ended with `next_rung`."""

    def end(self) -> None:
        """An arm keeps its checkpoints and its model."""


def _evaluate(job: Job, begins: Begins) -> Summary:
    here = InProcess(job.config.evaluate.gpus_per_worker, begins)
    summary = EvaluateTrained(job.config, job.run, executor=here).complete()
    drop_local_copy(job.run.model)  # the next job has another
    return summary


def _evaluate_on_gpu(gpus: float, job: Job) -> Summary:
    """Evaluate in a process that holds a GPU as long as that takes; if it dies, Ray runs it again."""
    title, shortest = f"evaluate {job.name}", job.config.evaluate.stall_seconds
    [(_, summary)] = watched_tasks(title, _evaluate, {job.name: [job]}, gpus, shortest)
    return summary
