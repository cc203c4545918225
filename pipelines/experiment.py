"""The paper's experiments on your model and data: arms trained at several seeds, compared prompt by prompt.

    python -m pipelines.experiment NAME --config pipelines/configs/sandbox.yaml [section.key=value ...]

NAME is imbalance, balanced-subset, methods, ablation, alpha or beta. Data are prepared and scored once, arms
run side by side as far as the cluster holds them. Writes <run_dir>/experiments/NAME: results.csv, figures,
and report.html, which has all of it on one page. The same command after a kill goes on where it stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.live import Live
from rich.table import Table

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.evaluation.answers import planned_items
from bdpo.evaluation.reading import Evaluation, read_evaluation
from bdpo.experiment_report import arms_table, csv_bytes, experiment_page
from bdpo.experiments import BASE, EXPERIMENTS, Arm, Experiment, arm_run, experiment, summarise_arms
from bdpo.page import write_page
from bdpo.placement import at_a_time
from bdpo.runs import MetricsLog, RunDir
from bdpo.search import measure, part_of
from bdpo.selection import require_labels, wants_scores
from bdpo.storage import StoragePath, write_bytes
from pipelines.arms import ArmActor, Job
from pipelines.cli import check_inputs, cluster_nodes, connect, console, main
from pipelines.evaluate import evaluate_model
from pipelines.plan import require_memory
from pipelines.preflight import refuse_what_does_not_fit
from pipelines.prepare import run_prepare
from pipelines.score import score_prepared


def run_experiment(config: Config, run: RunDir, name: str) -> None:
    """Run the arms that are missing, then write and print what came of all of them."""
    plan, base = experiment(name, config), run
    check_inputs(config)
    planned_items(config)
    run_prepare(config, run)
    if plan.arms and config.experiment.learning_rates:
        plan = replace(plan, arms=_with_best_rates(config, run, name, plan.arms))
        evaluate = config.evaluate.model_copy(update={"part": "held_out"})
        config, base = (
            config.model_copy(update={"evaluate": evaluate}),
            run.part("experiments", name, "held_out"),
        )
    jobs = _jobs(config, run, name, plan.arms, config.experiment.seeds)
    _work_off(config, run, jobs)
    if jobs:
        evaluate_model(config, base, "base")
    _finish(config, run, name, plan, jobs, base)


def _with_best_rates(config: Config, run: RunDir, name: str, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Each arm with the learning rate that is best for it, by the rule of a search, on the prompts of one."""
    search = part_of(config, "search")
    base = run.part("experiments", name, "search")
    evaluate_model(search, base, "base")
    base_scores = read_evaluation(base.eval("base")).scores
    chosen = []
    for arm in arms:
        rates = config.experiment.learning_rates
        trials = [Arm(f"{arm.name}-{rate:g}", arm.params | {"train.learning_rate": rate}) for rate in rates]
        jobs = _jobs(search, run, f"{name}/learning-rates", trials, config.experiment.seeds[:1])
        _work_off(search, run, jobs)
        measured = [measure(config.tune, _evaluation(job).scores, base_scores) for job in jobs]
        best = max(trials, key=lambda trial: measured[trials.index(trial)].score)
        console.print(f"[bold]rate[/]      {arm.name}: {best.params['train.learning_rate']:g}")
        chosen.append(replace(best, name=arm.name))
    return tuple(chosen)


def _jobs(config: Config, run: RunDir, name: str, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    return [Job(arm.name, seed, *arm_run(config, run, name, arm, seed)) for arm in arms for seed in seeds]


def _evaluation(job: Job) -> Evaluation:
    read = read_evaluation(job.run.eval("trained"))
    if not read.summary["valid"]:
        raise UserError(f"{job.run.eval('trained')}: the evaluation is invalid; mend the judge and run again")
    return read


def _score(config: Config, run: RunDir, jobs: Sequence[Job]) -> None:
    """Score once for each unconditional context that an arm wants."""
    if not jobs:
        score_prepared(config, run)
    for job in {str(job.run.scores): job for job in jobs if wants_scores(job.config)}.values():
        score_prepared(job.config, job.run)


def _work_off(config: Config, run: RunDir, jobs: Sequence[Job]) -> None:
    """Score what is wanted, then give the jobs that are not done to as many actors as the cluster holds.

    Raises:
        UserError: what a job found wrong, once all others are done.
        RayError: another fault of a job, likewise.
    """
    todo = deque(job for job in jobs if not job.done)
    for job in jobs:
        require_labels(job.config, job.run)
    if todo:
        require_memory(config)
        refuse_what_does_not_fit(config, run)
    _score(config, run, jobs)
    for job in jobs:
        if job.done:
            job.refuse_other()
    if not todo:
        return
    connect()
    import ray

    settings = config.experiment
    most = at_a_time(
        config, cluster_nodes(), len(todo), settings.max_concurrent_arms, "experiment.max_concurrent_arms"
    )
    gpus = config.evaluate.gpus_per_worker
    # A driver without GPU stays on the head node, which no autoscaler takes away.
    where: dict[str, Any] = {"num_gpus": gpus} if gpus else {"resources": {"node:__internal_head__": 0.001}}
    new: Any = ray.remote(num_cpus=0, **where)(ArmActor)
    idle = [new.remote() for _ in range(most)]
    console.print(f"[bold]arms[/]      {len(todo)} trainings to do, {most} at a time")
    working: dict[Any, Any] = {}
    faults: list[Exception] = []
    with Live(get_renderable=lambda: jobs_table(jobs), console=console, refresh_per_second=1, transient=True):
        while todo or working:
            while todo and idle:
                actor = idle.pop()
                working[actor.run.remote(todo.popleft())] = actor
            [ended], _ = ray.wait(list(working), num_returns=1)
            actor = working.pop(ended)
            try:
                ray.get(ended)
            except Exception as error:
                faults.append(getattr(error, "cause", None) or error)
                ray.kill(actor)  # it may be dead, or hold on to what it failed with
                actor = new.remote()
            idle.append(actor)
    console.print(jobs_table(jobs))
    for actor in idle:
        ray.kill(actor)
    if faults:
        console.print(f"[bold red]{len(faults)} trainings failed;[/] the same command tries them again")
        raise faults[0]


def jobs_table(jobs: Sequence[Job]) -> Table:
    """How far each arm is at each seed."""
    seeds = sorted({job.seed for job in jobs})
    table = Table("arm", *(f"seed {seed}" for seed in seeds))
    for arm in dict.fromkeys(job.arm for job in jobs):
        states = {job.seed: job.state() for job in jobs if job.arm == arm}
        table.add_row(arm, *(states.get(seed, "") for seed in seeds))
    return table


def _finish(
    config: Config, run: RunDir, name: str, plan: Experiment, jobs: Sequence[Job], base: RunDir
) -> None:
    """Tables, figures and the page, from what lies in the folders of the arms."""
    folder = run.part("experiments", name).root
    found = {arm.name: [_evaluation(job) for job in jobs if job.arm == arm.name] for arm in plan.arms}
    if jobs:
        found[BASE] = [read_evaluation(base.eval("base"))]
    results = summarise_arms(found) if found else None
    if results is not None:
        write_bytes(folder / "results.csv", csv_bytes(results))
        console.print(arms_table(results))
    logs = {
        arm.name: [MetricsLog(job.run.metrics).read() for job in jobs if job.arm == arm.name]
        for arm in plan.arms
    }
    write_page(experiment_page(config, run, plan, results, logs), folder / "report.html")
    console.print(f"report    {folder}/report.html, *.png", soft_wrap=True)


def _results(run: RunDir, name: str) -> list[StoragePath]:
    part = run.part("experiments", name)
    return [part.root, part.private]


if __name__ == "__main__":
    main(run_experiment, __doc__, _results, choice=tuple(EXPERIMENTS))
