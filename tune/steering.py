"""What Ray Tune asks while a sweep runs: which trial next, does it go on, and what became of it.

All three answer from the sweep's files and keep nothing to themselves, so Tune's own state need not be
saved: a sweep that is begun again gives Tune the trials that are still open, and new ones after those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from bdpo.search.sweep import Sweep
from bdpo.search.trials import is_promoted
from bdpo.variants.ends import End, Failure
from pipelines.runtime.faults import in_a_line


class Suggestions(Searcher):
    """Trials that are open, then new ones."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.sweep = sweep
        self.open = [trial.name for trial in sweep.open_trials()]

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        """Metric and space are the sweep's own."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """What `TrialActor` takes."""
        if self.open:
            return {"trial": self.open.pop(0)}
        if self.sweep.missing():
            return {"trial": self.sweep.suggest().name}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """It is on disk."""


class Survival(FIFOScheduler):
    """Asynchronous successive halving over the rungs of the sweep."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.sweep = sweep

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP."""
        here = self.sweep.trial(trial.config["trial"])
        promoted = is_promoted(here, self.sweep.trials(), self.sweep.config.tune)
        return str(TrialScheduler.CONTINUE if promoted else TrialScheduler.STOP)


class Failures(Callback):
    """Records a trial that met with faults which are not its own more often than `tune.max_failures`."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called once, when there is no recovery left."""
        file = trial.pickled_error_file  # None where Ray has no error of the actor's own
        what = in_a_line(cloudpickle.loads(Path(file).read_bytes())) if file else "its process died"
        error = f"{trial.num_failures} times, at last {what}"
        self.sweep.record_failure(trial.config["trial"], Failure(End.LOST, error))
