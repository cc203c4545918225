"""B-DPO training: Ray Train starts the workers, DeepSpeed ZeRO partitions the model over them.

    python -m pipelines.train --config pipelines/configs/sandbox.yaml [section.key=value ...]

Reads <run_dir>/data/pairs and <run_dir>/scores, writes <run_dir>/metrics.jsonl, checkpoints under
<run_dir>/train and the trained model to <run_dir>/model. The same command after a kill goes on from the
last checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.models import json_digest
from bdpo.plan import TrainingPlan
from bdpo.runs import Fingerprint, MetricsLog, RunDir, finished, write_manifest
from bdpo.scoring import read_scores, score_fingerprint
from pipelines.cli import connect, console, main, progress_bar, require


def run_train(config: Config, run: RunDir) -> dict[str, Any]:
    """Train on the scored pairs unless that is done; returns the manifest of the training."""
    fingerprint = train_fingerprint(config, run)
    manifest = finished(run.train / "manifest.json", fingerprint)
    if manifest is None or not run.model.is_dir():  # a lost model is exported from the last checkpoint
        started = time.perf_counter()
        steps = _fit(config, run, fingerprint)
        results = {"steps": steps, "seconds": time.perf_counter() - started}
        last = MetricsLog(run.metrics).read()[-1]
        manifest = write_manifest(run.train / "manifest.json", fingerprint, **results, last=last)
    last = manifest["last"]
    console.print(
        f"[bold]training[/]  {manifest['steps']} steps: loss {last['loss']:.3f}, "
        f"reward margin {last['rewards/margins']:.2f}, accuracy {last['rewards/accuracies']:.0%}"
    )
    return manifest


# Where and how often is not what: these keys may change between a kill and the resume.
_FREE = {"accelerator_type", "gpus_per_worker", "workers", "save_steps", "save_total_limit", "max_failures"}


def train_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that the trained model depends on, field by field."""
    sections = {"method": config.method.model_dump(), "train": config.train.model_dump(exclude=_FREE)}
    return {
        "scores": json_digest(score_fingerprint(config, run)),
        "seed": config.seed,
        **{f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()},
    }


def _fit(config: Config, run: RunDir, fingerprint: Fingerprint) -> int:
    """Run Ray Train to the end; returns the number of optimizer steps."""
    scores = read_scores(config, run)
    total_steps = TrainingPlan([0] * scores.num_rows, config.train, config.seed).total_steps
    _refuse_other_workers(config, run, fingerprint)
    connect()
    accelerator = config.train.accelerator_type
    require("train", config.train.workers, config.train.gpus_per_worker, accelerator=accelerator)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = config.train.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "run_dir": run.root, "scores": scores},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=gpus > 0,
            accelerator_type=accelerator,
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name="ray",  # the same name finds the checkpoints of the run that was killed
            storage_path=str(run.train),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.save_total_limit),
        ),
    )
    with _progress(run.metrics, total_steps):
        trainer.fit()
    return total_steps


def train_worker(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train

    from bdpo.training import train

    def report(folder: Path, metrics: dict[str, float]) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    config, run, scores = arguments["config"], RunDir(arguments["run_dir"]), arguments["scores"]
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        train(config, run, scores, None, report)
    else:
        with checkpoint.as_directory() as folder:
            train(config, run, scores, Path(folder), report)


def _refuse_other_workers(config: Config, run: RunDir, fingerprint: Fingerprint) -> None:
    """Remember what this training was begun with; refuse to go on with something else."""
    begun_file = run.train / "begun.json"
    begun = finished(begun_file, fingerprint)
    if begun and begun["workers"] != config.train.workers and any(run.train.glob("ray/checkpoint_*")):
        raise UserError(
            f"{run.train}: the checkpoints are of train.workers={begun['workers']} and cannot be resumed by "
            f"{config.train.workers}; set train.workers={begun['workers']}, or fresh=true to start over"
        )
    write_manifest(begun_file, fingerprint, workers=config.train.workers)


@contextmanager
def _progress(metrics_file: Path, total_steps: int) -> Iterator[None]:
    """A bar that follows metrics.jsonl, which the first worker writes."""
    log, stop = MetricsLog(metrics_file), threading.Event()

    with progress_bar("train", total_steps) as advance:

        def follow() -> None:
            shown = 0
            while not stop.wait(0.5):
                rows = log.read()
                if len(rows) != shown:
                    loss, margin = rows[-1]["loss"], rows[-1]["rewards/margins"]
                    advance(len(rows) - shown, f"loss {loss:.3f}  margin {margin:.2f}")
                    shown = len(rows)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


if __name__ == "__main__":
    main(run_train, __doc__, lambda run: [run.train, run.model, run.metrics])
