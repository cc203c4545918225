"""The trials of a search as the engine runs them: Ray Train trains, and every rung is evaluated.

The training workers stay alive from rung to rung: they export the model, and wait while the process of the
trial evaluates it with its own share of a GPU (`evaluate.gpus_per_worker`; it uses the CPUs of the workers,
which are idle). What is done already is not done again, so a trial that is run again resumes where it ended.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
from rich.table import Table

from bdpo.config.derive import part_of
from bdpo.evaluation.benchmarks.registry import path_label
from bdpo.evaluation.judges.registry import judge_label
from bdpo.scoring.selection import training_rows
from bdpo.search.sweep import Sweep
from bdpo.search.trials import end_of, is_promoted, rung_steps, winner
from bdpo.storage.cache import drop_local_copy
from bdpo.storage.paths import StoragePath, at_once, read_bytes, read_parquet
from bdpo.training.batches import plan_without_lengths
from bdpo.training.rungs import Rungs
from bdpo.variants.ends import End, Failure
from bdpo.variants.objective import measure, require_valid
from pipelines.evaluate import Evaluate
from pipelines.runtime.fit import fit
from pipelines.runtime.pool import InProcess
from pipelines.runtime.work_times import Begins
from pipelines.train import train_fingerprint


@dataclass(frozen=True)
class Trials:
    """The trials of a search, for `pipelines.runtime.variants`."""

    sweep: Sweep
    base_scores: pa.Table
    """Per-item scores of the base model on the prompts of the search."""

    title = "trials"

    def open_names(self) -> list[str]:
        """Trials that are begun and not at their end."""
        return [trial.name for trial in self.sweep.open_trials()]

    def missing(self) -> int:
        """How many trials are not yet suggested."""
        return self.sweep.missing()

    def next_name(self) -> str:
        """The name of the next trial; its parameters are on disk."""
        return self.sweep.suggest().name

    def runner(self, name: str, begins: Begins) -> TrialRunner:
        """What runs the trial of this name."""
        return TrialRunner(self.sweep, name, self.base_scores, begins)

    def is_promoted(self, name: str) -> bool:
        """Whether ASHA promotes the trial from the rung that it has reached."""
        return is_promoted(self.sweep.trial(name), self.sweep.trials(), self.sweep.config.tune)

    def record_failure(self, name: str, failure: Failure) -> None:
        """Record that a trial has no result."""
        self.sweep.record_failure(name, failure)

    def table(self) -> Table:
        """Every trial: its parameters, how far it is, and the results of its last rung in percent."""
        trials, tune = self.sweep.trials(), self.sweep.config.tune
        best = winner(trials, tune)
        judge = judge_label(self.sweep.config)
        table = Table(caption=f"percent, on the prompts of the search; judged by {judge}")
        keys = [key.rpartition(".")[2] for key in tune.space]
        shown = path_label(tune.metric), path_label(tune.constraint), "least allowed"
        for column in ("trial", *keys, "status", "step", *shown):
            table.add_column(column, justify="left" if column in ("trial", "status") else "right")
        logs = [self.sweep.folder(trial.name).metrics for trial in trials]
        for trial, steps in zip(trials, at_once(_lines, logs), strict=True):
            numbers = [""] * 3
            if trial.rungs:
                last = trial.rungs[-1].measured
                bound = last.base - tune.max_over_refusal
                values = (last.objective.known, last.constrained.known, bound)
                numbers = [f"{100 * value:.1f}" for value in values]
                numbers[0] += " broken" if last.broken else ""
            params = [trial.params[key] for key in tune.space]
            chosen = [f"{v:g}" if isinstance(v, float) else str(v) for v in params]
            end = end_of(trial, trials, tune)
            style = "bold green" if best and trial.name == best.name else None
            table.add_row(trial.name, *chosen, end, str(steps), *numbers, style=style)
        return table


def _lines(log: StoragePath) -> int:
    """Lines of a log, one a step; none before it is begun."""
    try:
        return read_bytes(log).count(b"\n")
    except FileNotFoundError:
        return 0


class TrialRunner:
    """A trial in the process that runs it, rung by rung."""

    def __init__(self, sweep: Sweep, name: str, base_scores: pa.Table, begins: Begins) -> None:
        self.sweep, self.name, self.base_scores, self.begins = sweep, name, base_scores, begins
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

    def next_rung(self) -> bool:
        """Train to the next rung, evaluate there and record the results; whether it was the last rung.

        Raises:
            InvalidEvaluation: too many verdicts are missing; they alone are asked for when it is retried.
        """
        if self.sweep.end_of(self.trial) != End.OPEN:  # the process before died between record and report
            return True
        number = len(self.trial.rungs)
        step, last = self.rungs.steps[number], number + 1 == len(self.rungs.steps)
        started = time.time()
        for before in self.rungs.steps[:number]:
            self.rungs.promote(before)
        self._train_to(step)
        trained = time.time()
        limit = None if last else self.settings.tune.rung_limit
        settings, name = part_of(self.settings, "search", limit), f"rung-{step}"
        here = InProcess(settings.evaluate.gpus_per_worker, self.begins)
        summary = Evaluate(settings, self.trial_run, name, here).complete()
        drop_local_copy(self.trial_run.model)  # the next rung has another
        require_valid(name, summary)
        scores = read_parquet(self.trial_run.eval(name) / "scores.parquet")
        measured = measure(self.settings.tune, scores, self.base_scores)
        seconds = {"train_seconds": trained - started, "evaluate_seconds": time.time() - trained}
        self.sweep.record_rung(self.trial, step, measured, **seconds)
        self.trial = self.sweep.trial(self.name)
        return last

    def stop_training(self) -> None:
        """Let the training workers end."""
        if self.training is not None:
            self.rungs.stop()
            self.training.join()
            self.training = None

    def end(self) -> None:
        """End the training and remove what the ended trial no longer requires."""
        self.stop_training()
        with suppress(Exception):  # the next trial must begin; what remains is removed when the search ends
            self.sweep.tidy(self.name)

    def _train_to(self, step: int) -> None:
        """Wait for the model after `step` steps; begin the training if it does not run."""
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
