"""B-DPO training: Ray Train starts the workers, DeepSpeed ZeRO partitions the model over them.

    python -m pipelines.train --config pipelines/configs/sandbox.yaml [section.key=value ...]

Reads <run_dir>/data/pairs and <run_dir>/scores, writes <run_dir>/metrics.jsonl, checkpoints under
<run_dir>/train and the trained model to <run_dir>/model; with train.lora the adapter to <run_dir>/adapter as
well. The same command after a kill goes on from the last checkpoint. Methods without a reference (cpo, simpo)
want no scores: they begin with the data. --dry-run prints what each GPU would need, without a GPU, weights
or data.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdpo.cluster.nodes import versions
from bdpo.config import Config
from bdpo.data.pairs import count_pairs
from bdpo.errors import UserError
from bdpo.models.adapters import check_lora
from bdpo.scoring.scores import score_fingerprint
from bdpo.scoring.selection import pairs_account, safety_account, training_rows, wants_scores
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint, finished, read_manifest, write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import arrow_filesystem, discard
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import plan_without_lengths
from bdpo.training.checkpoints import no_intact_checkpoint
from bdpo.training.rungs import Rungs
from bdpo.training.tracking import Tracking
from pipelines.prepare import run_prepare
from pipelines.runtime.cli import main
from pipelines.runtime.cluster import cluster_nodes, connect, require
from pipelines.runtime.plan_table import print_plan
from pipelines.runtime.progress import console, progress_bar

if TYPE_CHECKING:
    import pyarrow as pa


def run_train(config: Config, run: RunDir) -> dict[str, Any]:
    """Train on the scored pairs unless that is done; returns the manifest of the training."""
    if not wants_scores(config) and read_manifest(run.data / "manifest.json") is None:
        run_prepare(config, run)
    fingerprint = train_fingerprint(config, run)
    manifest = finished(run.train / "manifest.json", fingerprint)
    exported = run.has_model() and (config.train.lora is None or run.has_adapter())
    if manifest is None or not exported:  # what was lost is exported again from the last checkpoint
        started = time.perf_counter()
        steps = _fit(config, run, fingerprint)
        manifest = write_manifest(
            run.train / "manifest.json",
            fingerprint,
            steps=steps,
            seconds=time.perf_counter() - started,
            recoveries=MetricsLog(run.recoveries).read(),
            pairs=pairs_account(config, run, training_rows(config, run)),
            safety=safety_account(config, run),
            config=config.model_dump(),
            versions=versions(),
            last=MetricsLog(run.metrics).read()[-1],
        )
    last = manifest["last"]
    console.print(
        f"[bold]training[/]  {manifest['steps']} steps: loss {last['loss']:.3f}, "
        f"reward margin {last['rewards/margins']:.2f}, accuracy {last['rewards/accuracies']:.0%}"
    )
    return manifest


def train_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that the trained model depends on, field by field.

    What is not in it may change between a kill and the resume.
    """
    sections = {"method": config.method.fingerprint(), "train": config.train.fingerprint()}
    select = config.data.select
    return {
        "scores": json_digest(score_fingerprint(config, run)),
        "seed": config.seed,
        "data.select": select and select.model_dump(),
        **{f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()},
    }


def _fit(config: Config, run: RunDir, fingerprint: Fingerprint) -> int:
    """Run Ray Train to the end; returns the number of optimizer steps."""
    scores = training_rows(config, run)
    safety = safety_account(config, run)
    if safety:
        console.print(
            f"[bold]safety[/]    {safety['kept']} pairs kept + {safety['turned_round']} turned round (only "
            f"rejected is safe) + {safety['dropped']} dropped (both responses are unsafe)",
            soft_wrap=True,
        )
    if config.data.select:
        console.print(
            f"[bold]select[/]    {scores.num_rows} pairs of {count_pairs(run.pairs)} are trained on, see "
            "data.select",
            soft_wrap=True,
        )
    steps = plan_without_lengths(scores.num_rows, config.train, config.seed).total_steps
    check_lora(config)
    print_plan(config, scores.num_rows)
    connect()
    accelerator = config.train.accelerator_type
    require("train", config.train.workers, config.train.gpus_per_worker, accelerator=accelerator)
    with _progress(run, Tracking(config, run), steps):
        fit(config, run, scores, fingerprint)
    return steps


def fit(
    config: Config, run: RunDir, scores: pa.Table, fingerprint: Fingerprint, rungs: Rungs | None = None
) -> None:
    """Ray Train over the workers of `train`, from the newest whole checkpoint; they stand still at the rungs.

    Raises:
        UserError: it was begun with something else; no checkpoint is whole; what a worker found wrong.
        FloatingPointError: a loss or a gradient is not finite.
        TrainingFailedError: workers failed more than `train.max_failures` times.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.runtime.recovery import (
        Recovery,
        final_cause,
        incomplete_checkpoints,
        rebuild_checkpoint_list,
    )

    nodes = cluster_nodes()
    if nodes is not None and sum(count for count, _ in nodes) == 1:  # its end is that of the training
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    committed = _begin(config, run, fingerprint, scores.num_rows)
    whole, damaged = rebuild_checkpoint_list(run.train / "ray", committed, config.train)
    if damaged:
        note = {"damaged": damaged}
        MetricsLog(run.recoveries).append(note)
        console.print(_recovery_line(note))
    arguments = {"config": config, "run": run, "scores": scores, "rungs": rungs, "resumes": whole > 0}
    filesystem, storage_path = arrow_filesystem(run.train)
    gpus, best = config.train.gpus_per_worker, config.train.best_metric
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=gpus > 0,
            accelerator_type=config.train.accelerator_type,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name="ray",  # the same name finds the checkpoints of the run that was killed
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            # Ray deletes a checkpoint once newer or better ones are committed, and never the latest.
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.train.save_total_limit,
                checkpoint_score_attribute=best,
                checkpoint_score_order="max" if config.train.best_is_greatest else "min",
            ),
            callbacks=[Recovery(run.train / "begun.json")],  # type: ignore[list-item]
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise final_cause(error) from None
    # What a worker that died had half copied: Ray's rotation does not know it.
    discard(*(run.train / "ray" / name for name in incomplete_checkpoints(run.train / "ray")))


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

    from bdpo.training.loop import train
    from pipelines.runtime.recovery import remove_uncommitted

    def report_in_background(folder: Path, metrics: dict[str, float]) -> None:
        # Training goes on while the folder is copied to storage; Ray removes it then.
        checkpoint = Checkpoint.from_directory(folder)
        report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)

    def reported() -> Sequence[Any]:
        return get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    if arguments["resumes"] and not reported():
        raise no_intact_checkpoint({})  # whatever the reason, never from zero
    config, run, scores, rungs = (arguments[name] for name in ("config", "run", "scores", "rungs"))
    if get_context().get_world_rank() == 0:
        remove_uncommitted(run.train / "ray", reported())
    train(config, run, scores, reported, report_in_background, rungs)


def _begin(config: Config, run: RunDir, fingerprint: Fingerprint, pairs: int) -> int | None:
    """Remember what this training was begun with; returns the step of its last committed checkpoint, if any.

    Raises:
        UserError: it was begun with something else, nobody knows with what, or its checkpoints are of
            another number of workers.
    """
    begun_file = run.train / "begun.json"
    begun = finished(begun_file, fingerprint)
    if begun is None and MetricsLog(run.metrics).read():
        raise no_intact_checkpoint({})  # nobody knows how the steps that are logged were made
    committed: int | None = begun["committed"] if begun else None
    if begun and committed and begun["workers"] != config.train.workers:
        raise UserError(
            f"{run.train}: the checkpoints are of train.workers={begun['workers']} and cannot be resumed by "
            f"{config.train.workers}; set train.workers={begun['workers']}, or fresh=true to start over"
        )
    of = {"workers": config.train.workers, "pairs": pairs, "committed": committed}
    write_manifest(begun_file, fingerprint, **of)
    return committed


@contextmanager
def _progress(run: RunDir, tracking: Tracking, total_steps: int) -> Iterator[None]:
    """A bar and trackers that follow metrics.jsonl, which the first worker writes; a line a recovery."""
    # On object storage each look at the log is a request, and its worker writes it no more often.
    seconds = 0.5 if isinstance(run.metrics, Path) else MetricsLog.WRITE_SECONDS
    stop, seen = threading.Event(), MetricsLog(run.recoveries).read()

    with progress_bar("train", total_steps) as advance:

        def follow() -> None:
            steps = 0
            while not stop.wait(seconds):
                rows, notes = tracking.follow(), MetricsLog(run.recoveries).read()
                for note in notes[len(seen) :]:
                    console.print(_recovery_line(note))
                seen[:] = notes
                if len(rows) != steps:
                    advance(len(rows) - steps, _progress_note(rows[-1]) if rows else "")
                    steps = len(rows)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            tracking.close()


def _progress_note(row: dict[str, float]) -> str:
    held_out = f"  eval loss {row['eval_loss']:.3f}" if "eval_loss" in row else ""
    return (
        f"loss {row['loss']:.3f}  margin {row['rewards/margins']:.2f}  "
        f"accuracy {row['rewards/accuracies']:.0%}  {row['tokens_per_second']:,.0f} tokens/s{held_out}"
    )


def _recovery_line(note: dict[str, Any]) -> str:
    """What a row of recoveries.jsonl says, for people."""
    damaged = "; ".join(f"{name} is not used: {why}" for name, why in note["damaged"].items())
    if "step" not in note:
        return f"[bold]training[/]  {damaged}"
    lost = note["reached"] - note["step"]
    line = f"[bold]training[/]  goes on from step {note['step']}, {lost} steps are done again"
    return f"{line} ({damaged})" if damaged else line


if __name__ == "__main__":
    main(run_train, __doc__, lambda run: [run.train, run.model, run.adapter, run.metrics], dry_run=print_plan)
