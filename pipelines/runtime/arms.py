"""The trainings of an experiment, and the actor that does one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdpo.config import Config
from bdpo.config.derive import part_of
from bdpo.errors import first_line
from bdpo.evaluation.answers import prompts_fingerprint
from bdpo.evaluation.capability import NOT_RUN
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.evaluation.measures import Summary
from bdpo.evaluation.results import COMPARABLE
from bdpo.evaluation.tables import invalid_lines
from bdpo.experiments.arms import Arm, arm_run
from bdpo.storage.cache import drop_local_copy
from bdpo.storage.manifests import finished, read_manifest, require_same_fingerprint, write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.run_dir import RunDir
from bdpo.variants.objective import InvalidEvaluation
from pipelines.evaluate import EvaluateTrained
from pipelines.runtime.pool import InProcess
from pipelines.train import Train, train_fingerprint


@dataclass(frozen=True, eq=False)
class Job:
    """One training of an arm, and its evaluation."""

    arm: str
    seed: int
    config: Config
    run: RunDir

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do but a capability benchmark that could not be run."""
        folder = self.run.eval("trained")
        summary = read_manifest(folder / "summary.json")
        return (
            self.run.has_model()
            and summary is not None
            and bool(summary["valid"])
            and (folder / "scores.parquet").is_file()
        )

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.done and not self.not_run()

    @property
    def diverged(self) -> str | None:
        """Why the training ended in what is no number, as it would again."""
        file = self.run.root / "diverged.json"
        found = finished(file, train_fingerprint(self.config, self.run)) if file.is_file() else None
        return str(found["error"]) if found else None

    def record(self, fault: Exception) -> None:
        """Remember a fault that the same training would end in again."""
        if isinstance(fault, FloatingPointError):
            fingerprint = train_fingerprint(self.config, self.run)
            write_manifest(self.run.root / "diverged.json", fingerprint, error=first_line(fault))

    def not_run(self) -> list[str]:
        """The capability benchmarks that have no result."""
        folder = self.run.eval("trained") / "capability"
        read = {name: read_manifest(folder / f"{name}.json") for name in self.config.evaluate.capability}
        return [name for name, result in read.items() if result is None or NOT_RUN in result]

    def refuse_other(self) -> None:
        """Make sure that what is begun or done here was begun and done with this config.

        Raises:
            UserError: it was not; the message names the first difference.
        """
        fingerprint = train_fingerprint(self.config, self.run)
        for file in ("begun.json", "manifest.json"):
            finished(self.run.train / file, fingerprint)
        verdicts = self.run.eval("trained") / "summary.json"
        if summary := read_manifest(verdicts):
            # The weights are those that the training's manifest is of: they need not be read again.
            asked = prompts_fingerprint(self.config) | judge_fingerprint(self.config)
            known = summary["fingerprint"].keys() & {*asked, *COMPARABLE}
            require_same_fingerprint(verdicts, {key: summary["fingerprint"][key] for key in known}, asked)

    def state(self) -> str:
        """How far it is, in a word or two."""
        if self.done:
            return "done"
        if self.run.has_model():
            return "evaluating"
        rows = MetricsLog(self.run.metrics).read()
        return f"step {len(rows)}" if rows else "waiting" if not self.run.config.exists() else "begun"


class ArmActor:
    """Runs one job after the other: Ray Train trains; then this process evaluates, or one that has a GPU.

    It holds no GPU itself, so that a training may take all that there are.
    """

    def run(self, job: Job) -> None:
        """Whatever is done is not done again.

        Raises:
            InvalidEvaluation: too many verdicts are missing; the same job again asks for those alone.
        """
        job.run.record(job.config)
        Train(job.config, job.run).complete()
        gpus = job.config.evaluate.gpus_per_worker
        summary = _on_gpu(gpus, job) if gpus else _evaluate(job)
        if not summary.valid:
            raise InvalidEvaluation("; ".join(invalid_lines("trained", summary)))


def _evaluate(job: Job) -> Summary:
    here = InProcess(job.config.evaluate.gpus_per_worker)
    summary = EvaluateTrained(job.config, job.run, executor=here).complete()
    drop_local_copy(job.run.model)  # the next job has another
    return summary


def _on_gpu(gpus: float, job: Job) -> Summary:
    """Evaluate in a process that holds a GPU for so long; one that dies is begun again where it was."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        summary: Summary = ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(_evaluate).remote(job))
    except RayTaskError as error:
        raise error.cause from None
    return summary


def jobs_of(config: Config, run: RunDir, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    """Each arm at each seed."""
    return [Job(arm.name, seed, *arm_run(config, run, arm, seed)) for arm in arms for seed in seeds]


def trial_jobs(config: Config, run: RunDir, trials: Sequence[Arm]) -> list[Job]:
    """The trials of a search for learning rates, at the first seed."""
    return jobs_of(part_of(config, "search"), run, trials, config.experiment.seeds[:1])
