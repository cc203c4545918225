"""The results of an experiment, from the files in its folder: tables, CSV files, figures, the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bdpo.config.derive import part_of
from bdpo.errors import UserError
from bdpo.evaluation.judges.registry import judge_label
from bdpo.evaluation.results import Evaluation, read_evaluation
from bdpo.experiments.arms import ExperimentRecord, base_run, rescored
from bdpo.experiments.definitions import EXPERIMENTS
from bdpo.experiments.jobs import Job, jobs_of, rate_jobs
from bdpo.experiments.page import arms_table, csv_bytes, experiment_page
from bdpo.experiments.rates import RateTrial, rates_tried
from bdpo.experiments.results import (
    BASE,
    ArmDifference,
    ArmMeasure,
    ExperimentResults,
    arm_differences,
    arm_table,
    summarise_arms,
)
from bdpo.reports.cost import TimedStage
from bdpo.reports.page import write_page
from bdpo.storage.paths import StoragePath, discard, sorted_glob, write_bytes
from bdpo.storage.run_dir import RunDir
from pipelines.evaluate import EvaluateBase, EvaluateTrained
from pipelines.runtime.progress import console
from pipelines.score import Score
from pipelines.train import Train


def write_results(run: RunDir, name: str) -> None:
    """Write and print the tables, figures and the page of an experiment, from the files in its folder.

    Raises:
        UserError: it was never run, or its trainings were removed and not made again.
    """
    folder = run.part("experiments", name).root
    record = ExperimentRecord.read(folder)
    results = read_results(run, name, record)
    if results.arms and not results.trained and (folder / "results.csv").is_file():
        raise UserError(f"{folder}: its trainings are gone; the page stays as it is")
    discard(*sorted_glob(folder, "*.png"), *sorted_glob(folder, "*.csv"))  # of arms that are removed
    _write_tables(folder, results)
    if results.measures is not None:
        console.print(arms_table(results.measures, judge_label(record.config)))
    write_page(experiment_page(record.config, run, results), folder / "report.html")
    console.print(f"report    {folder}/report.html, *.png, *.csv", soft_wrap=True)


def read_results(run: RunDir, name: str, record: ExperimentRecord) -> ExperimentResults:
    """The results of an experiment that was run with this record, as far as its jobs are done."""
    plan, config = EXPERIMENTS[name], record.config
    jobs = jobs_of(config, run, record.arms, config.experiment.seeds, plan.rescores)
    trained = [job for job in jobs if job.done]
    measures = differences = None
    if trained:
        evaluations: dict[str, list[Evaluation]] = {}
        for job in trained:
            evaluations.setdefault(job.arm, []).append(read_evaluation(job.run.eval("trained")))
        evaluations[BASE] = [read_evaluation(base_run(config, run).eval("base"))]
        measures = summarise_arms(evaluations, record.arms[0].name)
        differences = arm_differences(evaluations)
    return ExperimentResults(
        plan,
        record.arms,
        trained,
        [*record.notes, *_missing(jobs)],
        measures,
        differences,
        rates_tried(run, record),
        plan.findings(run, trained),
        _stages(run, record, jobs),
    )


def _write_tables(folder: StoragePath, results: ExperimentResults) -> None:
    tables = {finding.name: finding.table for finding in results.findings}
    if results.measures is not None:
        tables["results"] = arm_table(ArmMeasure, results.measures)
    if results.differences is not None:
        tables["differences"] = arm_table(ArmDifference, results.differences)
    if results.rates:
        tables["rates"] = arm_table(RateTrial, results.rates)
    for name, table in tables.items():
        write_bytes(folder / f"{name}.csv", csv_bytes(table))


def _missing(jobs: Sequence[Job]) -> list[str]:
    """A sentence for the jobs without a result, and one for each job of which a part has none."""
    missing = [f"{job.name} ({job.end})" for job in jobs if not job.done]
    lines = [f"Not done, and not in these results: {'; '.join(missing)}."] if missing else []
    return lines + [
        f"{job.name}: {', '.join(job.not_run())} could not be run; the same command tries again."
        for job in jobs
        if job.done and not job.complete
    ]


def _stages(run: RunDir, record: ExperimentRecord, jobs: Sequence[Job]) -> list[TimedStage]:
    """Everything that the experiment does, finished or not."""
    config, trials = record.config, rate_jobs(record.config, run, record.trials)
    bases = {"evaluate base": base_run(config, run)} if jobs else {}
    if trials:
        bases["evaluate base, search"] = base_run(part_of(config, "search"), run)
    stages = [Score(config, run).timed()]
    contexts = {str(job.run.scores): job for job in jobs if job.run.scores != run.scores}
    stages += [
        Score(j.config, j.run).timed(f"score, {j.config.score.unconditional}") for j in contexts.values()
    ]
    for named, base in bases.items():
        stages.append(EvaluateBase(config, base).timed(named))
    for job in [*trials, *jobs]:
        stages.append(Train(job.config, job.run).timed(f"{job.name}: train"))
        evaluation = EvaluateTrained(job.config, job.run).timed(f"{job.name}: evaluate")
        alone = config.evaluate.gpus_per_worker  # an arm is evaluated in one process
        stages.append(replace(evaluation, gpus=alone))
        if job.rescores:
            stages.append(Score(*rescored(job.config, job.run)).timed(f"{job.name}: score again"))
    return stages
