"""A trial, as Ray Tune runs it: an actor that lets Ray Train train, and evaluates at every rung.

The training workers stay alive from rung to rung: they hand the model over, and wait while this actor
evaluates it with its own share of the cluster (`evaluate.gpus_per_worker`; processor time is that of the
training, which waits). The actor itself is kept for the next trial. Whatever it finds done it does not do
again, so a trial that is begun anew goes on where the last one was killed.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray import tune

from bdpo.config.derive import part_of
from bdpo.evaluation.tables import invalid_lines
from bdpo.scoring.selection import training_rows
from bdpo.search.sweep import Sweep
from bdpo.search.trials import rung_steps
from bdpo.storage.cache import drop_local_copy
from bdpo.storage.paths import open_parquet
from bdpo.training.batches import plan_without_lengths
from bdpo.training.rungs import Rungs
from bdpo.variants.ends import End, Failure
from bdpo.variants.objective import InvalidEvaluation, measure
from pipelines.evaluate import Evaluate
from pipelines.runtime.faults import in_a_line, own_fault
from pipelines.runtime.fit import fit
from pipelines.runtime.pool import InProcess
from pipelines.train import train_fingerprint


class TrialActor(tune.Trainable):
    """`config` is `{"trial": its name}`; one call of `step` is one rung."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], sweep: Sweep, base_scores: pa.Table
    ) -> None:
        """Called once for each actor; of what fails in here, or in `reset_config`, Tune retries nothing."""
        self.sweep, self.base_scores = sweep, base_scores
        self.name: str = config["trial"]
        self.runner: TrialRunner | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial takes over this actor, at its first step."""
        self.name = new_config["trial"]
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung and evaluate there; a fault of the trial's own is recorded and ends it.

        Raises:
            Exception: any other fault; Tune begins the trial again, `tune.max_failures` times.
        """
        try:
            return self._runner_of_trial().next_rung()
        except InvalidEvaluation as error:
            self.sweep.record_failure(self.name, Failure(End.INVALID, str(error)))
        except Exception as error:
            fault = own_fault(error)
            if fault is None:
                if self.runner is not None:
                    self.runner.stop_training()  # another actor is about to begin it again
                raise
            self.sweep.record_failure(self.name, Failure(End.FAILED, in_a_line(fault)))
        return {"done": True}

    def cleanup(self) -> None:
        """The actor ends."""
        if self.runner is not None:
            self.runner.end()

    def _runner_of_trial(self) -> TrialRunner:
        if self.runner is None or self.runner.trial.name != self.name:
            if self.runner is not None:
                self.runner.end()
            self.runner = None  # what fails from here on is not the fault of the trial before
            self.runner = TrialRunner(self.sweep, self.name, self.base_scores)
        return self.runner


class TrialRunner:
    """A trial on its way up the rungs, as far as this process takes it."""

    def __init__(self, sweep: Sweep, name: str, base_scores: pa.Table) -> None:
        self.sweep, self.base_scores = sweep, base_scores
        self.trial = sweep.trial(name)
        self.trial_run, self.settings = sweep.folder(name), sweep.config_of(self.trial)
        self.trial_run.record(self.settings)
        self.scores = training_rows(self.settings, self.trial_run)
        plan = plan_without_lengths(self.scores.num_rows, self.settings.train, self.settings.seed)
        steps = rung_steps(self.settings.tune.rungs, plan.total_steps)
        self.rungs = Rungs(self.trial_run.root / "rungs", tuple(steps))
        self.training: threading.Thread | None = None
        self.error: Exception | None = None
        if not self.trial_run.has_model():
            self.rungs.withdraw_export()

    def next_rung(self) -> dict[str, Any]:
        """Train to it and record what the model shows there; returns what Tune is told.

        Raises:
            InvalidEvaluation: too many verdicts are missing.
        """
        if self.sweep.end_of(self.trial) != End.OPEN:  # the actor before died before Tune knew of its end
            return {"trial": self.trial.name, "done": True}
        number = len(self.trial.rungs)
        step, last = self.rungs.steps[number], number + 1 == len(self.rungs.steps)
        started = time.time()
        for before in self.rungs.steps[:number]:
            self.rungs.promote(before)
        self._train_to(step)
        trained = time.time()
        limit = None if last else self.settings.tune.rung_limit
        settings, name = part_of(self.settings, "search", limit), f"rung-{step}"
        here = InProcess(settings.evaluate.gpus_per_worker)
        summary = Evaluate(settings, self.trial_run, name, here).complete()
        drop_local_copy(self.trial_run.model)  # the next rung has another
        if not summary.valid:
            raise InvalidEvaluation("; ".join(invalid_lines(name, summary)))
        scores = pq.read_table(open_parquet(self.trial_run.eval(name) / "scores.parquet"))
        measured = measure(self.settings.tune, scores, self.base_scores)
        seconds = {"train_seconds": trained - started, "evaluate_seconds": time.time() - trained}
        self.sweep.record_rung(self.trial, step, measured, **seconds)
        self.trial = self.sweep.trial(self.trial.name)
        return {"trial": self.trial.name, "rung": number, "score": measured.score, "done": last}

    def stop_training(self) -> None:
        """Let the workers go."""
        if self.training is not None:
            self.rungs.stop()
            self.training.join()
            self.training = None

    def end(self) -> None:
        """Leave the trial as it stands."""
        self.stop_training()
        with suppress(Exception):  # what is not tidied now is when the sweep ends; the next trial can begin
            self.sweep.tidy(self.trial.name)

    def _train_to(self, step: int) -> None:
        """Wait for the model after `step` steps, and let it be trained if nobody does."""
        if self.rungs.exported(step):
            return
        if self.training is None:
            self.rungs.clear_stop()
            self.training = threading.Thread(target=self._fit, daemon=True)
            self.training.start()
        while self.training.is_alive() and not self.rungs.exported(step):
            time.sleep(self.rungs.poll_seconds)
        if self.error is not None:
            raise self.error
        if step == self.rungs.steps[-1]:
            self.rungs.mark_exported(step)
        elif not self.rungs.exported(step):
            raise RuntimeError(f"the training ended before step {step}")

    def _fit(self) -> None:
        try:
            fingerprint = train_fingerprint(self.settings, self.trial_run)
            fit(self.settings, self.trial_run, self.scores, fingerprint, self.rungs)
        except Exception as error:
            self.error = error
