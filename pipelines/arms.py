"""The trainings of an experiment, and the actor that does one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from bdpo.config import Config
from bdpo.evaluation.answers import prompts_fingerprint
from bdpo.evaluation.judges import judge_fingerprint
from bdpo.runs import MetricsLog, RunDir, finished, read_manifest, refuse_other
from pipelines.evaluate import evaluate_model
from pipelines.train import run_train, train_fingerprint


@dataclass(frozen=True, eq=False)
class Job:
    """One training of an arm, and its evaluation."""

    arm: str
    seed: int
    config: Config
    run: RunDir

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        summary = read_manifest(self.run.eval("trained") / "summary.json")
        capability = self.run.eval("trained") / "capability"
        return (
            self.run.has_model()
            and summary is not None
            and bool(summary["valid"])
            and all((capability / f"{name}.json").is_file() for name in self.config.evaluate.capability)
        )

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
            asked = prompts_fingerprint(self.config) | judge_fingerprint(self.config.evaluate)
            refuse_other(verdicts, {key: summary["fingerprint"].get(key) for key in asked}, asked)

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
