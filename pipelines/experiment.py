"""The paper's experiments on your model and data: arms trained at several seeds, compared prompt by prompt.

    python -m pipelines.experiment NAME --config pipelines/configs/sandbox.yaml [section.key=value ...]

NAME is imbalance, balanced-subset, methods, ablation, alpha, beta or displacement. Data are prepared and
scored once, arms run side by side as far as the cluster holds them. Writes <run_dir>/experiments/NAME:
results.csv, figures, and report.html, which has all of it on one page. The same command after a kill goes on
where it stopped.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.live import Live
from rich.table import Table

from bdpo.cluster.placement import max_concurrent
from bdpo.cluster.status import StageStatus
from bdpo.config import Config
from bdpo.config.derive import part_of
from bdpo.errors import UserError, first_line
from bdpo.evaluation.answers import planned_items
from bdpo.evaluation.results import read_evaluation
from bdpo.experiments.arms import (
    Arm,
    Record,
    arm_run,
    base_run,
    experiment_results,
    rescored,
)
from bdpo.experiments.definitions import EXPERIMENTS, experiment
from bdpo.scoring.selection import require_labels, wants_scores
from bdpo.storage.paths import StoragePath, sorted_glob
from bdpo.storage.run_dir import RunDir
from bdpo.variants.objective import InvalidEvaluation, Measured, check_measures, measure
from pipelines.evaluate import EvaluateBase
from pipelines.prepare import Prepare
from pipelines.runtime.arms import ArmActor, Job, jobs_of, trial_jobs
from pipelines.runtime.cli import Command
from pipelines.runtime.cluster import cluster_nodes, connect
from pipelines.runtime.pool import ATTEMPTS
from pipelines.runtime.progress import console
from pipelines.runtime.stage import Stage, check_inputs
from pipelines.score import Score


def run_experiment(config: Config, run: RunDir, name: str) -> None:
    """Run the arms that are missing, then write and print what came of all of them.

    Raises:
        UserError: what an arm found wrong; the others are done by then, and on the page.
        RuntimeError: an arm failed in another way, likewise.
    """
    from pipelines.runtime.experiment_results import write_results

    arms = experiment(name, config).arms
    check_inputs([Prepare(config, run)])
    if arms:
        config = _evaluated(config)
    Prepare(config, run).complete()
    if not arms:
        Score(config, run).complete()
    arms, notes = _usable(config, run, arms)
    trials = tuple(trial for arm in arms for trial in _trials(config, arm))
    if trials:
        arms, said = _with_best_rates(config, run, arms, trials)
        notes += said
    jobs = jobs_of(config, run, arms, config.experiment.seeds)
    for job in jobs:
        job.refuse_other()
    todo, size = _make_ready(config, run, jobs)
    Record(config, arms, trials, notes).write(run.part("experiments", name).root)  # nothing was refused
    faults = _work_off(jobs, todo, size)
    if experiment(name, config).displaced:
        faults |= _rescore(jobs)
    _say(faults)
    write_results(run, name)
    _raise(faults)


def _evaluated(config: Config) -> Config:
    """The config that the arms are evaluated with: if each has to find its learning rate, on prompts of which
    that search saw none.

    Raises:
        UserError: they cannot be evaluated as it says.
    """
    if config.evaluate.engine != "transformers":
        raise UserError("evaluate.engine: an experiment evaluates with engine=transformers")
    if not config.experiment.learning_rates:
        planned_items(config)
        return config
    check_measures(config)
    for part in ("search", "held_out"):
        planned_items(part_of(config, part))
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
            notes.append(f"Left out is {arm.name}: {error}.")
            console.print(f"[bold]left out[/]  {arm.name}: {error}", soft_wrap=True)
    return tuple(usable), tuple(notes)


def _trials(config: Config, arm: Arm) -> list[Arm]:
    """An arm at every learning rate that it is to choose from."""
    key, rates = "train.learning_rate", config.experiment.learning_rates
    return [Arm(f"{arm.name}-{rate}", arm.params | {key: rate}) for rate in rates]


def _with_best_rates(
    config: Config, run: RunDir, arms: Sequence[Arm], trials: Sequence[Arm]
) -> tuple[tuple[Arm, ...], tuple[str, ...]]:
    """Each arm with the learning rate that is best for it on the prompts of a search, and notes on them.

    A rate is left out with which the training ends in what is no number, or too few answers can be judged.

    Raises:
        UserError: an arm can be trained with none of them; or what else went wrong, as in `run_experiment`.
    """
    search, jobs = part_of(config, "search"), trial_jobs(config, run, trials)
    for job in jobs:
        job.refuse_other()
    faults = _work_off(jobs, *_make_ready(search, run, jobs))
    _say(faults)
    no_good = FloatingPointError, InvalidEvaluation
    _raise({job: fault for job, fault in faults.items() if not isinstance(fault, no_good)})
    base_scores = read_evaluation(base_run(search, run).eval("base")).scores
    measured = {
        job.arm: measure(config.tune, read_evaluation(job.run.eval("trained")).scores, base_scores)
        for job in jobs
        if job.done
    }
    chosen, notes = [], []
    for arm in arms:
        best = best_trial(_trials(config, arm), measured)
        if best is None:
            raise UserError(f"experiment.learning_rates: {arm.name} can be trained with none of them")
        console.print(f"[bold]rate[/]      {arm.name}: {best.params['train.learning_rate']:g}")
        if measured[best.name].violation > 0:
            notes.append(f"With no learning rate is {arm.name} within tune.max_over_refusal: the nearest.")
            console.print(notes[-1], soft_wrap=True)
        chosen.append(replace(best, name=arm.name))
    return tuple(chosen), tuple(notes)


def best_trial(trials: Sequence[Arm], measured: Mapping[str, Measured]) -> Arm | None:
    """The best of those that are measured, by the rule of a search: of equals the one that complies more."""

    known = (trial for trial in trials if trial.name in measured)
    return max(known, key=lambda trial: measured[trial.name].rank, default=None)


def _make_ready(config: Config, run: RunDir, jobs: Sequence[Job]) -> tuple[list[Job], int]:
    """Do what the jobs share; returns those that are left to do, and how many of them run at a time.

    Raises:
        UserError: the base model's evaluation is invalid, or no job can be run at all.
    """
    todo = [job for job in jobs if not (job.complete or job.diverged)]
    size = _require_room(config, run, len(todo)) if todo else 0
    for job in {str(job.run.scores): job for job in jobs if wants_scores(job.config)}.values():
        Score(job.config, job.run).complete()  # once for each unconditional context
    if jobs and not EvaluateBase(config, base_run(config, run)).complete().valid:
        raise UserError("the evaluation of the base model is invalid: there is nothing to compare with")
    return todo, size


def _work_off(jobs: Sequence[Job], todo: Sequence[Job], size: int) -> dict[Job, Exception]:
    """Do what is left to do; returns the jobs that failed, now or before, and why."""
    diverged: dict[Job, Exception] = {job: FloatingPointError(job.diverged) for job in jobs if job.diverged}
    return diverged | (_on_actors(todo, jobs, size) if todo else {})


def _require_room(config: Config, run: RunDir, todo: int) -> int:
    """How many arms run at a time; a cluster that can hold none is refused before anything is scored."""
    from pipelines.preflight import refuse_what_does_not_fit
    from pipelines.runtime.plan_table import require_memory

    require_memory(config)
    refuse_what_does_not_fit(config, run)
    most = config.experiment.max_concurrent_arms
    return max_concurrent(config, cluster_nodes(), todo, most, "experiment.max_concurrent_arms")


def _on_actors(todo: Sequence[Job], jobs: Sequence[Job], size: int) -> dict[Job, Exception]:
    """Give the jobs to so many actors, and a job whose actor dies to another."""
    connect()
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    # On the head node, which no autoscaler takes away.
    actor: Any = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(ArmActor)
    idle = [actor.remote() for _ in range(size)]
    console.print(f"[bold]arms[/]      {len(todo)} trainings to do, {size} at the same time")
    queue, faults = deque(todo), dict[Job, Exception]()
    working = dict[Any, tuple[Job, Any]]()
    tries = Counter[Job]()
    with Live(
        get_renderable=lambda: jobs_table(jobs), console=console, refresh_per_second=0.5, transient=True
    ):
        while queue or working:
            while queue and idle:
                job, worker = queue.popleft(), idle.pop()
                tries[job] += 1
                working[worker.run.remote(job)] = job, worker
            [ended], _ = ray.wait(list(working), num_returns=1)
            job, worker = working.pop(ended)
            try:
                ray.get(ended)
            except Exception as error:
                if isinstance(error, RayActorError) and tries[job] < ATTEMPTS:
                    queue.append(job)
                else:
                    faults[job] = error.cause if isinstance(error, RayTaskError) else error
                    job.record(faults[job])
                ray.kill(worker)  # it may be dead, or hold on to what it failed with
                worker = actor.remote()
            idle.append(worker)
    console.print(jobs_table(jobs))
    for worker in idle:
        ray.kill(worker)
    return faults


def jobs_table(jobs: Sequence[Job]) -> Table:
    """How far each arm is at each seed."""
    seeds = sorted({job.seed for job in jobs})
    table = Table("arm", *(f"seed {seed}" for seed in seeds))
    for arm in dict.fromkeys(job.arm for job in jobs):
        states = {job.seed: job.state() for job in jobs if job.arm == arm}
        table.add_row(arm, *(states.get(seed, "") for seed in seeds))
    return table


def _say(faults: Mapping[Job, Exception]) -> None:
    for job, fault in faults.items():
        console.print(f"arm {job.arm}, seed {job.seed}: {first_line(fault)}", style="red", markup=False)


def _raise(faults: Mapping[Job, Exception]) -> None:
    """Of several faults the one that the user is to mend."""
    for fault in faults.values():
        if isinstance(fault, UserError):
            raise fault
    for fault in faults.values():
        raise RuntimeError(
            f"{len(faults)} arms failed; the same command tries again those that may pass"
        ) from fault


def _rescore(jobs: Sequence[Job]) -> dict[Job, Exception]:
    """Let the trained models score the pairs as the reference model did; returns those that could not."""
    faults: dict[Job, Exception] = {}
    for job in jobs:
        try:
            if job.done:
                Score(*rescored(job.config, job.run)).complete()
        except Exception as error:  # the others are to be on the page
            faults[job] = error
    return faults


@dataclass(frozen=True)
class Experiment(Stage):
    """One experiment of a run folder; without `which`, all those that were begun."""

    which: str | None = None

    name = "experiments"

    @property
    def _trainings(self) -> list[RunDir]:
        return [RunDir(folder) for folder in sorted_glob(self.run.root / "experiments", "arms*/*/seed-*")]

    @property
    def applies(self) -> bool:
        """Whether a training is begun."""
        return bool(self._trainings)

    def outputs(self) -> list[StoragePath]:
        """The experiment's results, and what it shares with the run and with other experiments."""
        return experiment_results(self.run, self.which) if self.which else []

    def complete(self) -> None:
        """Run the arms that are missing, and sum all up."""
        if self.which:
            run_experiment(self.config, self.run, self.which)

    def status(self) -> StageStatus:
        """How many trainings of all experiments are begun, trained and evaluated."""
        begun = self._trainings
        trained = sum(run.has_model() for run in begun)
        evaluated = sum((run.eval("trained") / "summary.json").is_file() for run in begun)
        counts = {"trainings": len(begun), "trained": trained, "evaluated": evaluated}
        return StageStatus.of(self.name, evaluated == len(begun), bool(begun), **counts)


main = Command(__doc__, (Experiment,), run_experiment, choice=tuple(EXPERIMENTS))

if __name__ == "__main__":
    main()
