"""What came of an experiment, from what lies in its folder: tables, figures, and the page with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from bdpo.config.derive import part_of
from bdpo.errors import UserError
from bdpo.evaluation.results import Evaluation, read_evaluation
from bdpo.experiments.arms import Record, base_run, rescored
from bdpo.experiments.definitions import experiment
from bdpo.experiments.displacement import displaced_pairs, displacement
from bdpo.experiments.results import BASE, arm_differences, summarise_arms
from bdpo.reports.cost import TimedStage, score_stage, stage_gpus, train_stage
from bdpo.reports.experiment import arms_table, csv_bytes, experiment_page
from bdpo.reports.page import write_page
from bdpo.reports.scores import mi_imbalance
from bdpo.scoring.scores import finished_scores
from bdpo.stats import ENDS
from bdpo.storage.paths import discard, sorted_glob, write_bytes
from bdpo.storage.run_dir import RunDir
from bdpo.variants.objective import Measured, measure
from pipelines.runtime.arms import Job, jobs_of, trial_jobs
from pipelines.runtime.progress import console

_RATE = "train.learning_rate"

RATES_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("learning_rate", pa.float64()),
        *((f"{name}{end}", pa.float64()) for name in ("objective", "constraint") for end in ENDS),
        ("least", pa.float64()),
        *((name, pa.bool_()) for name in ("feasible", "chosen")),
    ]
)


def write_results(run: RunDir, name: str) -> None:
    """Write and print tables, figures and the page of an experiment, from what lies in its folder.

    Raises:
        UserError: it was never run, or started over for another one and not trained since.
    """
    folder = run.part("experiments", name).root
    record = Record.read(folder)
    config = record.config
    plan = replace(experiment(name, config), arms=record.arms)
    jobs = jobs_of(config, run, plan.arms, config.experiment.seeds)
    done = [job for job in jobs if job.done]
    if plan.arms and not done and (folder / "results.csv").is_file():
        raise UserError(f"{folder}: its trainings are gone; the page stays as it is")
    discard(*sorted_glob(folder, "*.png"), *sorted_glob(folder, "*.csv"))  # of an arm that is no longer there
    results = differences = None
    if done:
        found: dict[str, list[Evaluation]] = {}
        for job in done:
            found.setdefault(job.arm, []).append(read_evaluation(job.run.eval("trained")))
        found[BASE] = [read_evaluation(base_run(config, run).eval("base"))]
        results = summarise_arms(found, plan.arms[0].name)
        write_bytes(folder / "results.csv", csv_bytes(results))
        console.print(arms_table(results))
        differences = arm_differences(found)
        write_bytes(folder / "differences.csv", csv_bytes(differences))
    rates = _rates(run, record)
    if rates is not None:
        write_bytes(folder / "rates.csv", csv_bytes(rates))
    if not plan.arms:
        imbalance = pa.Table.from_pylist([asdict(row) for row in mi_imbalance(finished_scores(run)[1])])
        write_bytes(folder / "results.csv", csv_bytes(imbalance))
    displaced = _displaced(run, done) if plan.displaced else {}
    if displaced:
        rows = [{"arm": arm, **row} for arm, pairs in displaced.items() for row in displacement(pairs)]
        write_bytes(folder / "displacement.csv", csv_bytes(pa.Table.from_pylist(rows)))
    trained = [(job.arm, job.config, job.run) for job in done]
    stages = _stages(run, record, jobs, plan.displaced)
    notes = [*record.notes, *_missing(jobs)]
    page = experiment_page(config, run, plan, results, trained, notes, displaced, stages, differences, rates)
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


def _rates(run: RunDir, record: Record) -> pa.Table | None:
    """A row an arm and learning rate: what the search showed, and which is `chosen`; None without a search.

    `objective` and `constraint` are `tune.metric` and `tune.constraint`, null where it could not be trained,
    or not be judged; `feasible` is a constraint of at least `least`.
    """
    if not record.trials:
        return None
    config, search = record.config, part_of(record.config, "search")
    base = read_evaluation(base_run(search, run).eval("base")).scores
    rows = []
    for job, trial in zip(trial_jobs(config, run, record.trials), record.trials, strict=True):
        rate = trial.params[_RATE]
        arm = next(arm for arm in record.arms if arm.params | {_RATE: rate} == trial.params)
        row = {"arm": arm.name, "learning_rate": rate, "chosen": arm.params[_RATE] == rate}
        if job.done:
            scores = read_evaluation(job.run.eval("trained")).scores
            row |= _measured(measure(config.tune, scores, base), config.tune.max_over_refusal)
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=RATES_SCHEMA)


def _measured(found: Measured, max_over_refusal: float) -> dict[str, Any]:
    """What a search goes by, as a row of `RATES_SCHEMA`."""
    estimates = {"objective": found.objective, "constraint": found.constrained}
    numbers: dict[str, Any] = {}
    for name, estimate in estimates.items():
        numbers |= estimate.columns(name)
    return numbers | {"least": found.base - max_over_refusal, "feasible": found.violation <= 0}


def _displaced(run: RunDir, done: Sequence[Job]) -> dict[str, pa.Table]:
    """By arm, what became of every pair, from the scores by the models that are trained."""
    after = dict[str, list[pa.Table]]()
    for job in done:
        _, folder = rescored(job.config, job.run)
        if (folder.scores / "manifest.json").is_file():
            after.setdefault(job.arm, []).append(finished_scores(folder)[1])
    before = finished_scores(run)[1] if after else None
    return {arm: displaced_pairs(before, scores) for arm, scores in after.items()}


def _stages(run: RunDir, record: Record, jobs: Sequence[Job], displaced: bool) -> list[TimedStage]:
    """All that the experiment does, done or not."""
    config, trials = record.config, trial_jobs(record.config, run, record.trials)
    bases = {"evaluate base": base_run(config, run)} if jobs else {}
    if trials:
        bases["evaluate base, search"] = base_run(part_of(config, "search"), run)
    stages = [score_stage(config, run)]
    contexts = {str(job.run.scores): job for job in jobs if job.run.scores != run.scores}
    stages += [
        score_stage(j.config, j.run, f"score, {j.config.score.unconditional}") for j in contexts.values()
    ]
    for named, base in bases.items():
        stages.append(TimedStage(named, base.eval("base") / "summary.json", stage_gpus(config.evaluate)))
    for job in [*trials, *jobs]:
        named, summary = f"{job.arm}, seed {job.seed}", job.run.eval("trained") / "summary.json"
        stages.append(train_stage(job.config, job.run, f"{named}: train"))
        alone = config.evaluate.gpus_per_worker  # an arm is evaluated in one process
        stages.append(TimedStage(f"{named}: evaluate", summary, alone))
        if displaced:
            stages.append(score_stage(*rescored(job.config, job.run), f"{named}: score again"))
    return stages
