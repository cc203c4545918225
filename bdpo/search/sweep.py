"""A search on disk: its trials, and the results of each.

    <run_dir>/tune/begun.json              the fingerprint of the search
    <run_dir>/tune/trials/0003/            a run folder with the pairs and scores of the run
        trial.json                         its parameters, written before it begins
        rungs/000000032.json               its results after 32 steps, and which trials were there before it
        rungs/*.exported, *.go, stop       messages between its driver and its training workers
        failed.json                        why it has no result, see `bdpo.variants.ends`
        config.yaml, metrics.jsonl, eval/  as in any run; in the end only the winner keeps model/, adapter/
    <run_dir>/tune/base/                   the base model on the prompts of the search and the held-out ones
    <run_dir>/tune/results.parquet, best.yaml, summary.json, *.png

Each file is complete or missing, and every decision is a function of the files: a search that was killed
resumes where it stopped, no trial is lost, and no rung is trained or evaluated twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bdpo.config import Config
from bdpo.config.derive import Params, trial_config
from bdpo.search.space import number_of_trials
from bdpo.search.suggest import suggest
from bdpo.search.trials import Rung, Trial, end_of
from bdpo.storage.manifests import Fingerprint, finished, read_facts, read_manifest, write_manifest
from bdpo.storage.paths import StoragePath, at_once, discard, sorted_glob
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import End, Failure, forget_failure, read_failure, write_failure
from bdpo.variants.objective import Measured


@dataclass(frozen=True)
class Sweep:
    """The trials of a search; a small object that is sent to every process that runs one."""

    config: Config
    run: RunDir
    fingerprint: Fingerprint

    def refuse_other(self) -> None:
        """Make sure that the folder does not hold another search.

        Raises:
            UserError: it does; the message names the first field that differs.
        """
        finished(self.run.tune / "begun.json", self.fingerprint)

    def begin(self) -> None:
        """Record the fingerprint of this search, unless `refuse_other` raises."""
        self.refuse_other()
        write_manifest(self.run.tune / "begun.json", self.fingerprint)

    def folder(self, name: str) -> RunDir:
        """The run folder of a trial."""
        return self.run.part("tune", "trials", name)

    def config_of(self, trial: Trial) -> Config:
        """The config that a trial is trained and evaluated with.

        Raises:
            UserError: its values are allowed one by one, but not together.
        """
        return trial_config(self.config, trial.params, str(self.folder(trial.name).root))

    def trials(self) -> list[Trial]:
        """See `read_trials`."""
        return read_trials(self.run)

    def trial(self, name: str) -> Trial:
        """A trial, read from its files.

        Raises:
            FileNotFoundError: there is no trial of this name.
        """
        trial = _read_trial(self.folder(name).root)
        if trial is None:
            raise FileNotFoundError(f"{self.folder(name).root}: no trial")
        return trial

    def end_of(self, trial: Trial) -> End:
        """See `bdpo.search.trials.end_of`."""
        return end_of(trial, self.trials(), self.config.tune)

    def open_trials(self) -> list[Trial]:
        """Trials that are begun and not at their end."""
        trials = self.trials()
        return [trial for trial in trials if end_of(trial, trials, self.config.tune) == End.OPEN]

    def missing(self) -> int:
        """How many trials are not yet suggested."""
        return max(0, number_of_trials(self.config) - len(self.trials()))

    def todo(self) -> int:
        """How many trials are missing, open, or tried again by this command."""
        again = [trial for trial in self.trials() if trial.failure is not None and trial.failure.retried]
        return self.missing() + len(self.open_trials()) + len(again)

    def suggest(self) -> Trial:
        """The next trial; its parameters are on disk before anything is done for it."""
        trials = self.trials()
        params: Params = suggest(self.config, len(trials), trials)
        trial = Trial(f"{len(trials):04d}", params)
        file = self.folder(trial.name).root / "trial.json"
        write_manifest(file, self.fingerprint, params=params, begun=time.time())
        return trial

    def record_rung(
        self,
        trial: Trial,
        step: int,
        measured: Measured,
        train_seconds: float = 0.0,
        evaluate_seconds: float = 0.0,
    ) -> None:
        """Commit the results of a trial after `step` steps."""
        number = len(trial.rungs)
        before = [other.name for other in self.trials() if len(other.rungs) > number]
        rung = Rung(step, measured, time.time(), train_seconds, evaluate_seconds, before)
        file = self.folder(trial.name).root / "rungs" / f"{step:09d}.json"
        write_manifest(file, self.fingerprint, **asdict(rung), score=measured.score)

    def record_failure(self, name: str, failure: Failure) -> None:
        """Commit that a trial has no result."""
        write_failure(self.folder(name).root, self.fingerprint, failure)

    def reopen(self) -> None:
        """Forget failures that are retried: such a trial resumes from its last checkpoint and its answers."""
        for trial in self.trials():
            if trial.failure is not None and trial.failure.retried:
                forget_failure(self.folder(trial.name).root)

    def tidy(self, name: str) -> None:
        """Remove what an ended trial no longer requires: its checkpoints, and the model if it cannot win."""
        trial = self.trial(name)
        end = self.end_of(trial)
        self._discard(trial, end, model=end != End.COMPLETED)

    def tidy_all(self, best: Trial | None) -> None:
        """Tidy every trial, also those whose process died; with a best trial, no other keeps its model."""
        trials = self.trials()
        for trial in trials:
            end = end_of(trial, trials, self.config.tune)
            beaten = best is not None and trial.name != best.name
            self._discard(trial, end, model=beaten or end != End.COMPLETED)

    def _discard(self, trial: Trial, end: End, model: bool) -> None:
        """Remove checkpoints, and the model if asked, of a trial that no command resumes."""
        run, retried = self.folder(trial.name), trial.failure is not None and trial.failure.retried
        if end != End.OPEN and (end == End.COMPLETED or not retried):
            discard(run.train, *([run.model, run.adapter] if model else []))


def read_trials(run: RunDir) -> list[Trial]:
    """Every trial that was suggested in a run folder, in the order of suggestion.

    A search asks for them before each decision, so on object storage they are read many at a time.
    """
    found = at_once(_read_trial, sorted_glob(run.tune / "trials", "*"))
    return [trial for trial in found if trial is not None]


def _read_trial(folder: StoragePath) -> Trial | None:
    """The trial in a folder; None if the process that made the folder was killed before it was suggested."""
    begun = read_manifest(folder / "trial.json")
    if begun is None:
        return None
    rungs = [_rung(read_facts(file)) for file in sorted_glob(folder / "rungs", "*.json")]
    return Trial(folder.name, begun["params"], rungs, read_failure(folder))


def _rung(recorded: Mapping[str, Any]) -> Rung:
    values = {field.name: recorded[field.name] for field in fields(Rung)}
    return Rung(**values | {"measured": Measured.from_json(recorded["measured"])})
