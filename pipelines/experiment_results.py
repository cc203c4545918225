"""What came of an experiment, from what lies in its folder: tables, figures, and the page with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from bdpo.displacement import displaced_pairs, displacement
from bdpo.evaluation.reading import Evaluation, read_evaluation
from bdpo.experiment_report import arms_table, csv_bytes, experiment_page
from bdpo.experiments import BASE, Record, base_run, experiment, rescored, summarise_arms
from bdpo.mi_report import mi_imbalance
from bdpo.page import write_page
from bdpo.report import Stage, gpus, score_stage, train_stage
from bdpo.runs import RunDir
from bdpo.scoring import finished_scores
from bdpo.search import part_of
from bdpo.storage import discard, matching, write_bytes
from pipelines.arms import Job, jobs_of, trial_jobs
from pipelines.cli import console


def write_results(run: RunDir, name: str) -> None:
    """Write and print tables, figures and the page of an experiment, from what lies in its folder.

    Raises:
        UserError: it was never run.
    """
    folder = run.part("experiments", name).root
    record = Record.read(folder)
    config = record.config
    plan = replace(experiment(name, config), arms=record.arms)
    jobs = jobs_of(config, run, plan.arms, config.experiment.seeds)
    done = [job for job in jobs if job.done]
    discard(*matching(folder, "*.png"), *matching(folder, "*.csv"))  # of an arm that is no longer there
    results = None
    if done:
        found: dict[str, list[Evaluation]] = {}
        for job in done:
            found.setdefault(job.arm, []).append(read_evaluation(job.run.eval("trained")))
        found[BASE] = [read_evaluation(base_run(config, run).eval("base"))]
        results = summarise_arms(found, plan.arms[0].name)
        write_bytes(folder / "results.csv", csv_bytes(results))
        console.print(arms_table(results))
    if not plan.arms:
        imbalance = pa.Table.from_pylist(mi_imbalance(finished_scores(run)[1]))
        write_bytes(folder / "results.csv", csv_bytes(imbalance))
    displaced = _displaced(run, done) if plan.displaced else {}
    if displaced:
        rows = [{"arm": arm, **row} for arm, pairs in displaced.items() for row in displacement(pairs)]
        write_bytes(folder / "displacement.csv", csv_bytes(pa.Table.from_pylist(rows)))
    trained = [(job.arm, job.config, job.run) for job in done]
    stages = _stages(run, record, jobs)
    page = experiment_page(
        config, run, plan, results, trained, [*record.notes, *_missing(jobs)], displaced, stages
    )
    write_page(page, folder / "report.html")
    console.print(f"report    {folder}/report.html, *.png, *.csv", soft_wrap=True)


def _missing(jobs: Sequence[Job]) -> list[str]:
    """What is not in the results, in words."""
    missing = [f"{job.arm}, seed {job.seed}" for job in jobs if not job.done]
    lines = [f"Not done, and not in what follows: {'; '.join(missing)}."] if missing else []
    return lines + [
        f"{job.arm}, seed {job.seed}: {', '.join(job.not_run())} could not be run; the same command tries "
        "again."
        for job in jobs
        if job.done and not job.complete
    ]


def _displaced(run: RunDir, done: Sequence[Job]) -> dict[str, pa.Table]:
    """By arm, what became of every pair, from the scores by the models that are trained."""
    after = dict[str, list[pa.Table]]()
    for job in done:
        _, folder = rescored(job.config, job.run)
        if (folder.scores / "manifest.json").is_file():
            after.setdefault(job.arm, []).append(finished_scores(folder)[1])
    before = finished_scores(run)[1] if after else None
    return {arm: displaced_pairs(before, scores) for arm, scores in after.items()}


def _stages(run: RunDir, record: Record, jobs: Sequence[Job]) -> list[Stage]:
    """All that the experiment does, done or not."""
    config, trials = record.config, trial_jobs(record.config, run, record.trials)
    bases = [base_run(config, run)] if jobs else []
    bases += [base_run(part_of(config, "search"), run)] if trials else []
    stages = [score_stage(config, run)]
    contexts = {str(job.run.scores): job for job in jobs if job.run.scores != run.scores}
    stages += [
        score_stage(j.config, j.run, f"score, {j.config.score.unconditional}") for j in contexts.values()
    ]
    stages += [("evaluate base", b.eval("base") / "summary.json", gpus(config.evaluate)) for b in bases]
    for job in [*trials, *jobs]:
        named, summary = f"{job.arm}, seed {job.seed}", job.run.eval("trained") / "summary.json"
        stages.append(train_stage(job.config, job.run, f"{named}: train"))
        stages.append((f"{named}: evaluate", summary, config.evaluate.gpus_per_worker))  # in one process
        stages.append(score_stage(*rescored(job.config, job.run), f"{named}: score again"))
    return stages
