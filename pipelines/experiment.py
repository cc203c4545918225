"""The paper's experiments on your model and data: arms trained at several seeds, compared prompt by prompt.

    python -m pipelines.experiment NAME --config pipelines/configs/sandbox.yaml [section.key=value ...]

NAME is an experiment of `bdpo.experiments.definitions`; --help lists them. Data are prepared and scored once;
as many arms run at the same time as the cluster holds. Writes <run_dir>/experiments/NAME:
results.csv, figures, and report.html, one page with all of it. The same command after a kill resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from bdpo.cluster.status import StageStatus
from bdpo.config import Config
from bdpo.config.derive import part_of
from bdpo.errors import UserError
from bdpo.experiments.arms import Arm, ExperimentRecord, arm_run, base_run, experiment_results
from bdpo.experiments.definitions import EXPERIMENTS
from bdpo.experiments.jobs import jobs_of, rate_jobs
from bdpo.experiments.rates import RATE, best_trial, measured_trials, rate_trials
from bdpo.scoring.selection import require_labels, requires_scores
from bdpo.storage.paths import StoragePath, sorted_glob
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import Cause, End, Failure
from pipelines.evaluate import EvaluateBase, EvaluateTrained
from pipelines.prepare import Prepare
from pipelines.runtime.arms import Arms
from pipelines.runtime.cli import Command
from pipelines.runtime.pool import ATTEMPTS
from pipelines.runtime.progress import console
from pipelines.runtime.stage import Stage, input_checks
from pipelines.runtime.variant_protocol import Limits
from pipelines.runtime.variants import check_evaluation, print_failures, require_room, run_variants
from pipelines.score import Score
from pipelines.train import Train

if TYPE_CHECKING:
    from bdpo.cluster.preflight import Check


def run_experiment(config: Config, run: RunDir, name: str) -> None:
    """Run the arms that are missing, then write and print the results of all of them.

    Raises:
        UserError: an arm met a fault that the user can fix; the others are done by then, and on the page.
        RuntimeError: an arm failed in another way; likewise.
    """
    from pipelines.runtime.experiment_results import write_results

    experiment, folder = EXPERIMENTS[name], run.part("experiments", name).root
    arms = experiment.arms(config)
    if arms:
        config = _evaluated(config)
    Prepare(config, run).complete()
    if not arms:
        Score(config, run).complete()
    arms, notes = _usable(config, run, arms)
    trials = tuple(trial for arm in arms for trial in rate_trials(config, arm))
    if trials:
        arms, more_notes = _with_best_rates(config, run, arms, trials)
        notes += more_notes
    work = Arms.of(jobs_of(config, run, arms, config.experiment.seeds, experiment.rescores))
    concurrent = _make_ready(config, run, work)
    ExperimentRecord(config, arms, trials, notes).write(folder)  # nothing was refused
    failures = _run_jobs(work, concurrent, folder)
    print_failures("arm", failures)
    write_results(run, name)
    _raise(failures)


def _evaluated(config: Config) -> Config:
    """The config that the arms are evaluated with.

    Arms that search for their learning rate are evaluated on the prompts that the search left out.
    """
    if not config.experiment.learning_rates:
        return config
    evaluate = config.evaluate.model_copy(update={"part": "held_out"})
    return config.model_copy(update={"evaluate": evaluate})


def _usable(config: Config, run: RunDir, arms: Sequence[Arm]) -> tuple[tuple[Arm, ...], tuple[str, ...]]:
    """The arms that the data allow, and a line for each of the others."""
    usable, notes = [], []
    for arm in arms:
        try:
            require_labels(*arm_run(config, run, arm, config.experiment.seeds[0]))
            usable.append(arm)
        except UserError as error:
            notes.append(f"{arm.name} is left out: {error}.")
            console.print(f"[bold]left out[/]  {arm.name}: {error}", soft_wrap=True)
    return tuple(usable), tuple(notes)


def _with_best_rates(
    config: Config, run: RunDir, arms: Sequence[Arm], trials: Sequence[Arm]
) -> tuple[tuple[Arm, ...], tuple[str, ...]]:
    """Each arm with the learning rate that is best for it on the prompts of a search, and notes on them.

    A rate with which the training diverges, or too few answers can be judged, is left out.

    Raises:
        UserError: an arm can be trained with none of them; or another fault, as in `run_experiment`.
    """
    search, work = part_of(config, "search"), Arms.of(rate_jobs(config, run, trials))
    concurrent = _make_ready(search, run, work)
    failures = _run_jobs(work, concurrent, run.part("experiments", "arms-search").root)
    print_failures("arm", failures)
    _raise({job: f for job, f in failures.items() if f.retried and f.end != End.INVALID})
    measured = measured_trials(config, run, trials)
    chosen, notes = [], []
    for arm in arms:
        best = best_trial(rate_trials(config, arm), measured)
        if best is None:
            raise UserError(f"experiment.learning_rates: {arm.name} can be trained with none of them")
        console.print(f"[bold]rate[/]      {arm.name}: {best.params[RATE]:g}")
        if measured[best.name].violation > 0:
            notes.append(
                f"{arm.name} exceeds tune.max_over_refusal or tune.max_broken with every learning rate: it "
                "is trained with the one that exceeds them least."
            )
            console.print(notes[-1], soft_wrap=True)
        chosen.append(replace(best, name=arm.name))
    return tuple(chosen), tuple(notes)


def _make_ready(config: Config, run: RunDir, arms: Arms) -> int:
    """Do what the jobs share; returns how many of them run at the same time, 0 if none is left to do.

    Raises:
        UserError: the base model's evaluation is invalid, or the cluster can hold no job.
    """
    todo, jobs = len(arms.todo), arms.jobs
    concurrent = require_room(config, run, todo, "experiment.max_concurrent_arms") if todo else 0
    for job in {str(job.run.scores): job for job in jobs if requires_scores(job.config)}.values():
        Score(job.config, job.run).complete()  # once for each unconditional context
    if jobs and not EvaluateBase(config, base_run(config, run)).complete().valid:
        raise UserError("the evaluation of the base model is invalid: there is nothing to compare with")
    return concurrent


def _run_jobs(arms: Arms, concurrent: int, folder: StoragePath) -> dict[str, Failure]:
    """Run the jobs that are left to do; returns the failures of now and before, by the name of the job."""
    if concurrent:
        shortest = arms.jobs[0].config.evaluate.stall_seconds
        limits = Limits(concurrent, max_failures=ATTEMPTS - 1, stall_seconds=shortest)
        run_variants(arms, folder, len(arms.todo), limits)
        console.print(arms.table())
    return arms.failures


def _raise(failures: Mapping[str, Failure]) -> None:
    """End the command if an arm has no result, if possible with a fault that the user can fix."""
    for name, failure in failures.items():
        if failure.cause == Cause.USER:
            raise UserError(f"arm {name}: {failure.error.removeprefix('UserError: ')}")
    if failures:
        raise RuntimeError(
            f"{len(failures)} arms have no result; the same command tries those again that may succeed"
        )


@dataclass(frozen=True)
class ExperimentStage(Stage):
    """One experiment of a run folder; without `which`, all those that were begun."""

    which: str | None = None

    name = "experiments"

    @property
    def _trainings(self) -> list[RunDir]:
        return [RunDir(folder) for folder in sorted_glob(self.run.root / "experiments", "arms*/*/seed-*")]

    @classmethod
    def found_in(cls, config: Config, run: RunDir) -> Sequence[Self]:
        """The experiments of a run folder, if a training is begun."""
        experiments = cls(config, run)
        return [experiments] if experiments._trainings else []

    def outputs(self) -> list[StoragePath]:
        """The results of the experiment, and what it shares with the run and with other experiments."""
        return experiment_results(self.run, self.which) if self.which else []

    def complete(self) -> None:
        """Run the arms that are missing, and write the results of all."""
        if self.which:
            run_experiment(self.config, self.run, self.which)

    def status(self) -> StageStatus:
        """How many trainings of all experiments are begun, trained and evaluated."""
        begun = self._trainings
        trained = sum(run.has_model() for run in begun)
        evaluated = sum(EvaluateTrained(self.config, run).recorded() is not None for run in begun)
        counts = {"trainings": len(begun), "trained": trained, "evaluated": evaluated}
        return StageStatus.of(self.name, evaluated == len(begun), bool(begun), **counts)

    def input_checks(self) -> Mapping[str, Check]:
        """Those of the data and, if there are arms, of their training, and they can be evaluated."""
        if self.which is None:
            return {}
        config, run = self.config, self.run
        if not EXPERIMENTS[self.which].arms(config):
            return Prepare(config, run).input_checks()
        return {**input_checks([Prepare(config, run), Train(config, run)]), "evaluation": _check_arms}


def _check_arms(config: Config, run: RunDir) -> str:
    return check_evaluation(config, "an experiment", searched=bool(config.experiment.learning_rates))


main = Command(__doc__, (ExperimentStage,), choice=tuple(EXPERIMENTS))

if __name__ == "__main__":
    main()
