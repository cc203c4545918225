"""The paper's experiments on your model and data: arms trained at several seeds, compared prompt by prompt.

    python -m pipelines.experiment NAME --config pipelines/configs/sandbox.yaml [section.key=value ...]

NAME is imbalance, balanced-subset, methods, ablation, alpha or beta. Data are prepared and scored once, arms
run side by side as far as the cluster holds them. Writes <run_dir>/experiments/NAME: results.csv, figures,
and report.html, which has all of it on one page. The same command after a kill goes on where it stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from rich.live import Live
from rich.table import Table

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.evaluation.answers import planned_items
from bdpo.evaluation.reading import read_evaluation
from bdpo.experiment_report import arms_table, csv_bytes, experiment_page
from bdpo.experiments import BASE, EXPERIMENTS, Arm, Experiment, arm_run, experiment, summarise_arms
from bdpo.page import write_page
from bdpo.placement import at_a_time
from bdpo.runs import MetricsLog, RunDir
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
    plan = experiment(name, config)
    check_inputs(config)
    planned_items(config)
    run_prepare(config, run)
    jobs = [_job(config, run, name, arm, seed, {}) for arm in plan.arms for seed in config.experiment.seeds]
    for job in jobs:
        require_labels(job.config, job.run)
    if not all(job.done for job in jobs):
        require_memory(config)
        refuse_what_does_not_fit(config, run)
    _score(config, run, jobs)
    for job in jobs:
        if job.done:
            job.refuse_other()
    if jobs:
        evaluate_model(config, run, "base")
        _work_off(config, jobs)
    _finish(config, run, name, plan, jobs)


def _job(config: Config, run: RunDir, name: str, arm: Arm, seed: int, params: dict[str, Any]) -> Job:
    return Job(arm.name, seed, *arm_run(config, run, name, arm, seed, params))


def _scores(job: Job) -> pa.Table:
    read = read_evaluation(job.run.eval("trained"))
    if not read.summary["valid"]:
        raise UserError(f"{job.run.eval('trained')}: the evaluation is invalid; mend the judge and run again")
    return read.scores


def _score(config: Config, run: RunDir, jobs: Sequence[Job]) -> None:
    """Score once for each unconditional context that an arm wants."""
    if not jobs:
        score_prepared(config, run)
    for job in {str(job.run.scores): job for job in jobs if wants_scores(job.config)}.values():
        score_prepared(job.config, job.run)


def _work_off(config: Config, jobs: Sequence[Job]) -> None:
    """Give the jobs that are not done to as many actors as the cluster holds at a time.

    Raises:
        UserError: what a job found wrong, once all others are done.
        RayError: another fault of a job, likewise.
    """
    todo = deque(job for job in jobs if not job.done)
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


def _finish(config: Config, run: RunDir, name: str, plan: Experiment, jobs: Sequence[Job]) -> None:
    """Tables, figures and the page, from what lies in the folders of the arms."""
    folder = run.part("experiments", name).root
    scores = {arm.name: [_scores(job) for job in jobs if job.arm == arm.name] for arm in plan.arms}
    if jobs:
        scores[BASE] = [read_evaluation(run.eval("base")).scores]
    results = summarise_arms(scores) if scores else None
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
