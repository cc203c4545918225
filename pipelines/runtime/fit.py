"""One training under Ray Train: begun or resumed, and followed to its end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdpo.config import Config, TrainConfig, workers_label
from bdpo.storage.manifests import Fingerprint, finished, write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import arrow_filesystem, discard
from bdpo.storage.run_dir import RunDir
from bdpo.training.rungs import Rungs
from pipelines.runtime.cluster import cluster_nodes
from pipelines.runtime.progress import console
from pipelines.runtime.ray_internals import full_node_line
from pipelines.runtime.stalls import Reporter, watching
from pipelines.runtime.work_times import PAUSED

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.train.torch import TorchTrainer

COLLECTIVE_SECONDS = 1800
"""How long gloo or NCCL waits for the other workers: for the first worker's hashing or export, for one."""


def fit(
    config: Config, run: RunDir, scores: pa.Table, fingerprint: Fingerprint, rungs: Rungs | None = None
) -> None:
    """Ray Train over the workers of `train`, from the newest intact checkpoint; they wait at the rungs.

    Raises:
        UserError: it was begun with something else; no checkpoint is intact; what a worker found wrong.
        FloatingPointError: a loss or a gradient is not finite.
        TrainingFailedError: workers failed more than `train.max_failures` times.
        RayActorError: Ray Train's controller died more often than that.
        NoRoom: the cluster had no room for the workers within the limit.
    """
    from ray.exceptions import RayActorError

    nodes = cluster_nodes()
    if nodes is not None and sum(number for number, _ in nodes) == 1:  # its end is that of the training
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    arguments = {"config": config, "run": run, "scores": scores, "rungs": rungs}
    for death in count(1):
        committed = _begin(config, run, fingerprint, scores.num_rows)
        try:
            return _fit_from(committed, config, run, arguments)
        except RayActorError as error:  # the workers' own failures are a TrainingFailedError
            if 0 <= config.train.max_failures < death:
                raise
            why = full_node_line(error) or "its process ended"
            console.print(f"[bold]training[/]  Ray Train's controller died ({why}); starting it again")


def _fit_from(committed: int | None, config: Config, run: RunDir, arguments: dict[str, Any]) -> None:
    """`fit`, once; `committed` is the step of the last committed checkpoint.

    Raises:
        RayActorError: Ray Train's controller died, and its workers with it.
    """
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    from pipelines.runtime.recovery import final_cause, incomplete_checkpoints, rebuild_checkpoint_list

    intact, damaged = rebuild_checkpoint_list(run.train / "ray", committed, config.train)
    if damaged:
        note = {"damaged": damaged}
        MetricsLog(run.recoveries).append(note)
        console.print(recovery_line(note))
    try:
        with watching("training", config.train.stall_seconds, together=True) as watched:
            given = {**arguments, "resumes": intact > 0, "watch": watched.watch}
            try:  # in a thread: `fit` would put a handler of SIGINT in the main one, and never remove it
                watched.wait(_trainer(config.train, run, given).fit)
            except RayActorError:
                watched.release()
                raise
    except TrainingFailedError as error:
        raise final_cause(error) from None
    # What a worker that died had half copied: Ray's rotation does not know it.
    discard(*(run.train / "ray" / name for name in incomplete_checkpoints(run.train / "ray")))


def _trainer(train: TrainConfig, run: RunDir, arguments: dict[str, Any]) -> TorchTrainer:
    """Ray's trainer of section `train`, whose workers get `arguments`."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.runtime.ray_internals.elastic import ElasticTrainer
    from pipelines.runtime.recovery import Recovery

    filesystem, storage_path = arrow_filesystem(run.train)
    gpus = train.gpus_per_worker
    is_elastic = train.min_workers < train.max_workers
    return (ElasticTrainer if is_elastic else TorchTrainer)(
        train_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.max_workers) if is_elastic else train.min_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=0,  # type: ignore[call-arg]  # `CheckpointScalingPolicy` decides when
            use_gpu=gpus > 0,
            accelerator_type=train.accelerator_type,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name="ray",  # the same name finds the checkpoints of the run that was killed
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=train.max_failures),
            # Ray deletes a checkpoint once newer or better ones are committed, and never the latest.
            checkpoint_config=CheckpointConfig(
                num_to_keep=train.save_total_limit,
                checkpoint_score_attribute=train.best_metric,
                checkpoint_score_order="max" if train.best_is_greatest else "min",
            ),
            callbacks=[Recovery(run.train / "begun.json")],  # type: ignore[list-item]
        ),
    )


def train_worker(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    from ray.train import (
        Checkpoint,
        CheckpointConsistencyMode,
        CheckpointUploadMode,
        get_all_reported_checkpoints,
        get_context,
        report,
    )

    from bdpo.training.checkpoints import no_intact_checkpoint
    from bdpo.training.launcher import Launcher, Phase
    from bdpo.training.loop import train
    from pipelines.runtime.recovery import remove_uncommitted

    reporter = Reporter(arguments["watch"])
    reporter.hold_placement_group()

    def begins(phase: Phase) -> None:
        reporter.begin(PAUSED if phase is Phase.DECISION else phase.value, phase.value)

    begins(Phase.START)

    def report_in_background(folder: Path, metrics: dict[str, float]) -> None:
        # Training continues while the folder is copied to storage; Ray removes it then.
        checkpoint = Checkpoint.from_directory(folder)
        report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)

    def reported() -> Sequence[Any]:
        return get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    if arguments["resumes"] and not reported():
        raise no_intact_checkpoint({})  # whatever the reason, never from zero
    config, run, scores, rungs = (arguments[name] for name in ("config", "run", "scores", "rungs"))
    if get_context().get_world_rank() == 0:
        remove_uncommitted(run.train / "ray", reported())
    train(config, run, scores, Launcher(reported, report_in_background, begins), rungs)
    reporter.begin("end", "the upload of the last checkpoint")


def _begin(config: Config, run: RunDir, fingerprint: Fingerprint, pairs: int) -> int | None:
    """Remember what this training was begun with; returns the step of its last committed checkpoint, if any.

    Raises:
        UserError: it was begun with something else, or nobody knows with what.
    """
    from bdpo.training.checkpoints import no_intact_checkpoint

    begun_file = run.train / "begun.json"
    begun = finished(begun_file, fingerprint)
    if begun is None and MetricsLog(run.metrics).read():
        raise no_intact_checkpoint({})  # nobody knows how the steps that are logged were made
    committed: int | None = begun["committed"] if begun is not None else None
    workers = workers_label(config.train.workers)
    if begun and committed and workers_label(begun["workers"]) != workers:
        console.print(
            f"[bold]training[/]  was begun with {workers_label(begun['workers'])} workers and resumes with "
            f"{workers}: each of them reads the complete checkpoint once; results are equal to "
            "rounding",
            soft_wrap=True,
        )
    facts = {"workers": config.train.workers, "pairs": pairs, "committed": committed}
    write_manifest(begun_file, fingerprint, **facts)
    return committed


def recovery_line(note: dict[str, Any]) -> str:
    """A row of recoveries.jsonl as a line for the terminal."""
    damaged = "; ".join(f"{name} is not used: {why}" for name, why in note["damaged"].items())
    if "step" not in note:
        return f"[bold]training[/]  {damaged}"
    lost = note["reached"] - note["step"]
    workers = f" with {note['workers']} workers" if "workers" in note else ""
    line = f"[bold]training[/]  resumes from step {note['step']}{workers}, {lost} steps are repeated"
    return f"{line} ({damaged})" if damaged else line
