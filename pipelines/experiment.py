"""The paper's experiments on your model and data: arms trained at several seeds, compared prompt by prompt.

    python -m pipelines.experiment NAME --config pipelines/configs/sandbox.yaml [section.key=value ...]

NAME is imbalance, balanced-subset, methods, ablation, alpha, beta or displacement. Data are prepared and
scored once, arms run side by side as far as the cluster holds them. Writes <run_dir>/experiments/NAME:
results.csv, figures, and report.html, which has all of it on one page. The same command after a kill goes on
where it stopped.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from rich.live import Live
from rich.table import Table

from bdpo.config import Config
from bdpo.displacement import displaced_pairs, displacement
from bdpo.errors import UserError
from bdpo.evaluation.answers import planned_items
from bdpo.evaluation.reading import read_evaluation
from bdpo.experiment_report import arms_table, csv_bytes, experiment_page
from bdpo.experiments import BASE, EXPERIMENTS, Arm, Experiment, arm_run, experiment, rescored, summarise_arms
from bdpo.mi_report import mi_imbalance
from bdpo.models import first_line
from bdpo.page import write_page
from bdpo.placement import at_a_time
from bdpo.runs import RunDir
from bdpo.scoring import read_scores
from bdpo.search import measure, part_of
from bdpo.selection import require_labels, wants_scores
from bdpo.storage import StoragePath, write_bytes
from pipelines.arms import ArmActor, Job
from pipelines.cli import check_inputs, cluster_nodes, connect, console, main
from pipelines.evaluate import evaluate_model
from pipelines.plan import require_memory
from pipelines.pool import ATTEMPTS
from pipelines.preflight import refuse_what_does_not_fit
from pipelines.prepare import run_prepare
from pipelines.score import score_prepared


def run_experiment(config: Config, run: RunDir, name: str) -> None:
    """Run the arms that are missing, then write and print what came of all of them.

    Raises:
        UserError: what an arm found wrong; the others are done by then, and on the page.
        RuntimeError: an arm failed in another way, likewise.
    """
    plan, base = experiment(name, config), run
    check_inputs(config)
    planned_items(config)
    if config.evaluate.engine != "transformers":
        raise UserError("evaluate.engine: an experiment evaluates with engine=transformers")
    run_prepare(config, run)
    if not plan.arms:
        score_prepared(config, run)
    elif config.experiment.learning_rates:
        plan = replace(plan, arms=_with_best_rates(config, run, name, plan.arms))
        evaluate = config.evaluate.model_copy(update={"part": "held_out"})
        config = config.model_copy(update={"evaluate": evaluate})
        base = run.part("experiments", name, "held_out")
    jobs = _jobs(config, run, name, plan.arms, config.experiment.seeds)
    faults = _work_off(config, run, base, jobs)
    _finish(config, run, name, plan, jobs, base)
    for job, fault in faults.items():
        console.print(f"arm {job.arm}, seed {job.seed}: {first_line(fault)}", style="red", markup=False)
    for fault in faults.values():
        if isinstance(fault, UserError):
            raise fault
        raise RuntimeError(f"{len(faults)} trainings failed; the same command tries them again")


def _with_best_rates(config: Config, run: RunDir, name: str, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Each arm with the learning rate that is best for it, by the rule of a search, on the prompts of one."""
    search, base, chosen = part_of(config, "search"), run.part("experiments", name, "search"), []
    for arm in arms:
        rates = config.experiment.learning_rates
        trials = [Arm(f"{arm.name}-{rate}", arm.params | {"train.learning_rate": rate}) for rate in rates]
        jobs = _jobs(search, run, f"{name}/learning-rates", trials, config.experiment.seeds[:1])
        faults = _work_off(search, run, base, jobs)
        base_scores = read_evaluation(base.eval("base")).scores
        scores = {
            trial: measure(config.tune, read_evaluation(job.run.eval("trained")).scores, base_scores).score
            for trial, job in zip(trials, jobs, strict=True)
            if job not in faults
        }
        if not scores:
            raise UserError(f"experiment.learning_rates: {arm.name} can be trained with none of {rates}")
        best = max(scores, key=scores.__getitem__)
        console.print(f"[bold]rate[/]      {arm.name}: {best.params['train.learning_rate']:g}")
        chosen.append(replace(best, name=arm.name))
    return tuple(chosen)


def _jobs(config: Config, run: RunDir, name: str, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    return [Job(arm.name, seed, *arm_run(config, run, name, arm, seed)) for arm in arms for seed in seeds]


def _work_off(config: Config, run: RunDir, base: RunDir, jobs: Sequence[Job]) -> dict[Job, Exception]:
    """Do all that the jobs want done, first what they share; returns the jobs that failed, and why.

    Raises:
        UserError: a folder holds results of another config; the base model's evaluation is invalid; or no
            job can be run at all.
    """
    todo = [job for job in jobs if not job.done]
    for job in jobs:
        require_labels(job.config, job.run)
    if todo:
        require_memory(config)
        refuse_what_does_not_fit(config, run)
    for job in {str(job.run.scores): job for job in jobs if wants_scores(job.config)}.values():
        score_prepared(job.config, job.run)  # once for each unconditional context
    for job in jobs:
        job.refuse_other()
    if jobs and not evaluate_model(config, base, "base")["valid"]:
        raise UserError("the evaluation of the base model is invalid: there is nothing to compare with")
    return _on_actors(config, todo, jobs) if todo else {}


def _on_actors(config: Config, todo: Sequence[Job], jobs: Sequence[Job]) -> dict[Job, Exception]:
    """Give the jobs to as many actors as the cluster holds, and a job whose actor dies to another."""
    connect()
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    most = config.experiment.max_concurrent_arms
    size = at_a_time(config, cluster_nodes(), len(todo), most, "experiment.max_concurrent_arms")
    gpus = config.evaluate.gpus_per_worker
    # A driver without GPU stays on the head node, which no autoscaler takes away.
    where: dict[str, Any] = {"num_gpus": gpus} if gpus else {"resources": {"node:__internal_head__": 0.001}}
    actor: Any = ray.remote(num_cpus=0, **where)(ArmActor)
    idle = [actor.remote() for _ in range(size)]
    console.print(f"[bold]arms[/]      {len(todo)} trainings to do, {size} at a time")
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


def _finish(
    config: Config, run: RunDir, name: str, plan: Experiment, jobs: Sequence[Job], base: RunDir
) -> None:
    """Tables, figures and the page, from what lies in the folders of the arms that are done."""
    folder, done = run.part("experiments", name).root, [job for job in jobs if job.done]
    found = {
        arm.name: [read_evaluation(job.run.eval("trained")) for job in done if job.arm == arm.name]
        for arm in plan.arms
    }
    missing = [f"{job.arm}, seed {job.seed}" for job in jobs if job not in done]
    found = {arm: seeds for arm, seeds in found.items() if seeds}
    results = None
    if found:
        results = summarise_arms(found | {BASE: [read_evaluation(base.eval("base"))]})
        write_bytes(folder / "results.csv", csv_bytes(results))
        console.print(arms_table(results))
    if not plan.arms:
        imbalance = pa.Table.from_pylist(mi_imbalance(read_scores(config, run)))
        write_bytes(folder / "results.csv", csv_bytes(imbalance))
    displaced = _displaced(config, run, done) if plan.displaced else {}
    if displaced:
        rows = [{"arm": arm, **row} for arm, pairs in displaced.items() for row in displacement(pairs)]
        write_bytes(folder / "displacement.csv", csv_bytes(pa.Table.from_pylist(rows)))
    trained = [(job.arm, job.config, job.run) for job in done]
    page = experiment_page(config, run, plan, results, trained, missing, displaced)
    write_page(page, folder / "report.html")
    console.print(f"report    {folder}/report.html, *.png", soft_wrap=True)


def _displaced(config: Config, run: RunDir, done: Sequence[Job]) -> dict[str, pa.Table]:
    """By arm, what became of every pair: the trained models score them as the reference model did."""
    before, after = read_scores(config, run), dict[str, list[pa.Table]]()
    for job in done:
        settings, folder = rescored(job.config, job.run)
        score_prepared(settings, folder)
        after.setdefault(job.arm, []).append(read_scores(settings, folder))
    return {arm: displaced_pairs(before, scores) for arm, scores in after.items()}


def _results(run: RunDir, name: str) -> list[StoragePath]:
    part = run.part("experiments", name)
    return [run.data, run.scores, run.eval("base"), run.responses("base"), part.root, part.private]


if __name__ == "__main__":
    main(run_experiment, __doc__, _results, choice=tuple(EXPERIMENTS))
