"""The trainings of an experiment, and the actor that does one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from bdpo.config import Config
from bdpo.evaluation.answers import answers_fingerprint, evaluated_model, score_store
from bdpo.runs import MetricsLog, RunDir, finished
from pipelines.evaluate import evaluate_model
from pipelines.train import run_train, train_fingerprint


@dataclass(frozen=True)
class Job:
    """One training of an arm, and its evaluation."""

    arm: str
    seed: int
    config: Config
    run: RunDir

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.run.has_model() and (self.run.eval("trained") / "summary.json").is_file()

    def refuse_other(self) -> None:
        """Make sure that what is done was done with this config.

        Raises:
            UserError: it was not; the message names the first difference.
        """
        finished(self.run.train / "manifest.json", train_fingerprint(self.config, self.run))
        answers = answers_fingerprint(self.config, evaluated_model(self.config, self.run, "trained"))
        verdicts = score_store(self.config, self.run, "trained", answers).fingerprint
        finished(self.run.eval("trained") / "summary.json", verdicts)

    def state(self) -> str:
        """How far it is, in a word or two."""
        if self.done:
            return "done"
        if self.run.has_model():
            return "evaluating"
        rows = MetricsLog(self.run.metrics).read()
        return f"step {len(rows)}" if rows else "waiting" if not self.run.config.exists() else "begun"


class ArmActor:
    """Runs one job after the other: Ray Train trains, this process evaluates."""

    def run(self, job: Job) -> None:
        """Whatever is done is not done again."""
        job.run.record(job.config)
        run_train(job.config, job.run)
        evaluate_model(job.config, job.run, "trained", here=True)
