"""A sweep on disk: which trials there are, how far each came, and what is wanted of its training.

    <run_dir>/tune/begun.json              the fingerprint of the sweep
    <run_dir>/tune/trials/0003/            a run folder with the pairs and scores of the sweep's own
        trial.json                         its parameters, written before it begins
        rungs/000000032.json               what it showed after 32 steps, and who was there before
        rungs/*.exported, *.go, stop        between its driver and its training workers
        failed.json                        why there is no score
        config.yaml, metrics.jsonl, eval/  as of any run; model/, adapter/ of the winner alone at the end
    <run_dir>/tune/base/                   the base model on the prompts of the search and the held-out ones
    <run_dir>/tune/results.parquet, best.yaml, summary.json, *.png

Each file is there whole or not at all, and every decision is a function of them: a killed sweep goes on
where it stopped, no trial is lost, and what one has shown is not asked of it again.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from bdpo.config import Config
from bdpo.config.derive import Params, trial_config
from bdpo.search.objective import Measured
from bdpo.search.space import number_of_trials
from bdpo.search.suggest import suggest
from bdpo.search.trials import Rung, Trial, status
from bdpo.storage.manifests import Fingerprint, finished, read_manifest, write_manifest
from bdpo.storage.paths import discard, matching
from bdpo.storage.run_dir import RunDir

# Ends of a trial that are not its own: a judge or a machine failed, and may have been mended.
PASSING = ("invalid", "lost")


@dataclass(frozen=True)
class Sweep:
    """The trials of a run folder; a small object that goes wherever trials are run."""

    config: Config
    run: RunDir
    fingerprint: Fingerprint

    def refuse_other(self) -> None:
        """Make sure that the folder does not hold another sweep.

        Raises:
            UserError: it does; the message names the first difference.
        """
        finished(self.run.tune / "begun.json", self.fingerprint)

    def begin(self) -> None:
        """Remember what this sweep is of, unless `refuse_other` raises."""
        self.refuse_other()
        write_manifest(self.run.tune / "begun.json", self.fingerprint)

    def folder(self, name: str) -> RunDir:
        """The run folder of a trial."""
        return self.run.part("tune", "trials", name)

    def config_of(self, trial: Trial) -> Config:
        """What a trial is trained and evaluated with.

        Raises:
            UserError: its values, each of which is one that there can be, do not go together.
        """
        return trial_config(self.config, trial.params, str(self.folder(trial.name).root))

    def trials(self) -> list[Trial]:
        """Every trial that was suggested, in that order."""
        found = matching(self.run.tune / "trials", "*/trial.json")
        return [self.trial(file.parent.name) for file in found]

    def trial(self, name: str) -> Trial:
        """A trial as it stands now."""
        root = self.folder(name).root
        rungs = [_rung(read_manifest(file)) for file in matching(root / "rungs", "*.json")]
        begun, failure = read_manifest(root / "trial.json"), read_manifest(root / "failed.json")
        return Trial(name, (begun or {})["params"], rungs, failure)

    def status(self, trial: Trial) -> str:
        """See `bdpo.search.trials.status`."""
        return status(trial, self.trials(), self.config.tune)

    def open_trials(self) -> list[Trial]:
        """Trials that are begun and not at their end."""
        trials = self.trials()
        return [trial for trial in trials if status(trial, trials, self.config.tune) == "open"]

    def missing(self) -> int:
        """How many trials are not suggested yet."""
        return max(0, number_of_trials(self.config.tune) - len(self.trials()))

    def todo(self) -> int:
        """How many trials are missing, open, or to be reopened."""
        trials = self.trials()
        ends = [status(trial, trials, self.config.tune) for trial in trials]
        return self.missing() + sum(end in ("open", *PASSING) for end in ends)

    def suggest(self) -> Trial:
        """The next trial; it is on disk before anything is done for it."""
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
        """Commit what a trial showed after `step` steps."""
        number = len(trial.rungs)
        before = [other.name for other in self.trials() if len(other.rungs) > number]
        rung = Rung(step, measured, time.time(), train_seconds, evaluate_seconds, before)
        file = self.folder(trial.name).root / "rungs" / f"{step:09d}.json"
        write_manifest(file, self.fingerprint, **asdict(rung), score=measured.score)

    def record_failure(self, name: str, kind: str, error: str) -> None:
        """Commit that a trial has no score; `error` is one line without text of the data."""
        write_manifest(self.folder(name).root / "failed.json", self.fingerprint, kind=kind, error=error)

    def reopen(self) -> None:
        """Forget failures that are not the trial's own: it goes on from its last checkpoint and answers."""
        for trial in self.trials():
            if trial.failure is not None and trial.failure["kind"] in PASSING:
                (self.folder(trial.name).root / "failed.json").unlink()

    def tidy(self, name: str) -> None:
        """Remove what only a trial that goes on needs: its checkpoints, and the model if it cannot win."""
        end = self.status(self.trial(name))
        self._discard(name, end, model=end in ("stopped", "failed"))

    def tidy_all(self, best: Trial | None) -> None:
        """The same of every trial: one that ended with its driver could not. With a best, its model stays."""
        trials = self.trials()
        for trial in trials:
            end = status(trial, trials, self.config.tune)
            lost = best is not None and trial.name != best.name
            self._discard(trial.name, end, model=lost or end != "completed")

    def _discard(self, name: str, end: str, model: bool) -> None:
        run = self.folder(name)
        if end in ("completed", "stopped", "failed"):
            discard(run.train, *([run.model, run.adapter] if model else []))


def _rung(manifest: dict[str, Any] | None) -> Rung:
    there = manifest or {}
    values = {field.name: there[field.name] for field in fields(Rung)}
    return Rung(**values | {"measured": Measured(**there["measured"])})
