"""What Ray Tune is made of for `pipelines.runtime.variants`: an actor, a searcher, a scheduler, a callback.

They ask the variants' files and keep no state of their own, so Tune's own state need not be saved: a command
that is begun again gives Tune the variants that are still open, and new ones after those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune import (
    Callback,
    CheckpointConfig,
    FailureConfig,
    PlacementGroupFactory,
    RunConfig,
    TuneConfig,
    Tuner,
)
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from bdpo.variants.ends import Cause, End, Failure
from bdpo.variants.objective import InvalidEvaluation
from pipelines.runtime.faults import in_a_line, own_fault
from pipelines.runtime.ray_internals import HEAD_NODE, error_of_trial, keep_secrets
from pipelines.runtime.stalls import Reporter
from pipelines.runtime.work_times import PAUSED, Begins

if TYPE_CHECKING:
    from pipelines.runtime.stalls import WatchHandle
    from pipelines.runtime.variant_protocol import Limits, Runner, Variants


def tuner_of(
    variants: Variants, storage: tuple[Any, str], todo: int, limits: Limits, watch: WatchHandle
) -> Tuner:
    """Tune's runner of `todo` variants; `storage` is the file system and folder of Tune's own files.

    The processes of the variants report to `watch`.
    """
    keep_secrets()
    filesystem, storage_path = storage
    actor = tune.with_parameters(VariantActor, variants=variants, begins=Reporter(watch).begin)
    return Tuner(
        tune.with_resources(actor, PlacementGroupFactory([actor_resources(limits.gpus)])),
        tune_config=TuneConfig(
            search_alg=Names(variants),
            scheduler=Promotion(variants),
            num_samples=todo,
            max_concurrent_trials=limits.concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=limits.max_failures),
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # variants have their own
            callbacks=[RecordLost(variants)],
            verbose=0,
        ),
    )


def actor_resources(gpus: float) -> dict[str, float]:
    """What the process of a variant holds: its share of a GPU to evaluate with.

    Without a share it stays on the head node, which no autoscaler takes away.
    """
    return {"CPU": 0, "GPU": gpus} if gpus else {"CPU": 0, HEAD_NODE: 0.001}


class VariantActor(tune.Trainable):
    """Runs variants one after the other; `config` is `{"variant": its name}`, one `step` is one rung."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], variants: Variants, begins: Begins
    ) -> None:
        """Called once for each actor. Tune retries nothing that fails in here or in `reset_config`."""
        self.variants, self.begins = variants, begins
        self.begins(PAUSED, "its trainings")  # which have a watch of their own
        self.name: str = config["variant"]
        self.runner: Runner | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next variant takes over this actor, at its first step."""
        self.name = new_config["variant"]
        return True

    def step(self) -> dict[str, str | bool]:
        """Run the variant to its next rung; a fault of its own, or an invalid evaluation, is recorded.

        Raises:
            Exception: any other fault; Tune begins the variant again, `max_failures` times.
        """
        try:
            return {"variant": self.name, "done": self._current_runner().next_rung()}
        except InvalidEvaluation as error:
            self.variants.record_failure(self.name, Failure(End.INVALID, str(error)))
        except Exception as error:
            fault = own_fault(error)
            if fault is None:
                if self.runner is not None:
                    self.runner.stop_training()
                raise
            self.variants.record_failure(self.name, Failure(End.FAILED, in_a_line(fault), Cause.of(fault)))
        return {"variant": self.name, "done": True}

    def cleanup(self) -> None:
        """The actor ends."""
        if self.runner is not None:
            self.runner.end()

    def _current_runner(self) -> Runner:
        if self.runner is None or self.runner.name != self.name:
            if self.runner is not None:
                self.runner.end()
            self.runner = None  # an error from here on is not the fault of the variant before
            self.runner = self.variants.runner(self.name, self.begins)
        return self.runner


class Names(Searcher):
    """The names of the variants: open ones first, then new ones."""

    def __init__(self, variants: Variants) -> None:
        super().__init__()
        self.variants = variants
        self.open = variants.open_names()

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        """Metric and space belong to the variants."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The `config` of a `VariantActor`."""
        if self.open:
            return {"variant": self.open.pop(0)}
        return {"variant": self.variants.next_name()} if self.variants.missing() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The results are on disk."""


class Promotion(FIFOScheduler):
    """Stops a variant early that is not promoted from the rung that it has reached."""

    def __init__(self, variants: Variants) -> None:
        super().__init__()
        self.variants = variants

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP."""
        promoted = self.variants.is_promoted(trial.config["variant"])
        return str(TrialScheduler.CONTINUE if promoted else TrialScheduler.STOP)


class RecordLost(Callback):
    """Records a variant as lost that met faults not its own more often than it is retried."""

    def __init__(self, variants: Variants) -> None:
        self.variants = variants

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called once, when no retry is left."""
        raised = error_of_trial(trial)
        what = in_a_line(raised) if raised else "its process died"
        error = f"{trial.num_failures} times, at last {what}"
        self.variants.record_failure(trial.config["variant"], Failure(End.LOST, error))
