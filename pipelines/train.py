"""B-DPO training: Ray Train starts the workers, DeepSpeed ZeRO partitions the model over them.

    python -m pipelines.train --config pipelines/configs/sandbox.yaml [section.key=value ...]

Reads <run_dir>/data/pairs and <run_dir>/scores, writes <run_dir>/metrics.jsonl, checkpoints under
<run_dir>/train and the trained model to <run_dir>/model; with train.lora the adapter to <run_dir>/adapter as
well. The same command after a kill resumes from the last checkpoint. Methods without a reference, see
docs/methods.md, require no scores: their training begins with the data. --dry-run prints what each GPU would
need, without a GPU, weights or data.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdpo.cluster.status import StageStatus
from bdpo.config import Config
from bdpo.data.pairs import count_pairs
from bdpo.models.loading import model_folder, weights_digest
from bdpo.scoring.scores import score_fingerprint
from bdpo.scoring.selection import pairs_account, requires_scores, safety_account, training_rows
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint, Manifest, read_facts, write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import StoragePath, sorted_glob
from bdpo.storage.records import TrainingRecord, prepared_pairs, versions
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import plan_without_lengths
from pipelines.prepare import Prepare
from pipelines.runtime.cli import Command
from pipelines.runtime.cluster import connect, require_capacity
from pipelines.runtime.fit import fit, recovery_line
from pipelines.runtime.progress import console, progress_bar
from pipelines.runtime.stage import ManifestStage, Stage

if TYPE_CHECKING:
    import pyarrow as pa

    from bdpo.cluster.preflight import Check
    from bdpo.training.tracking import Tracking


class Train(ManifestStage):
    """Trains on the scored pairs, or on the prepared pairs where the method requires no scores."""

    name = "train"
    section = "train"

    @property
    def manifest_file(self) -> StoragePath:
        """What was trained with what, and its last step."""
        return self.run.train / "manifest.json"

    def outputs(self) -> list[StoragePath]:
        """Checkpoints, model, adapter and log."""
        return [self.run.train, self.run.model, self.run.adapter, self.run.metrics]

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Scores, method, selection and training; how the training runs is not in it."""
        return train_fingerprint(self.config, self.run)

    def has_results(self, manifest: Manifest) -> bool:
        """Whether model and adapter exist; what was lost is exported again from the last checkpoint."""
        return self.run.has_model() and (self.config.train.lora is None or self.run.has_adapter())

    def complete(self) -> Manifest:
        """Train unless that is done; returns the manifest of the training."""
        if not requires_scores(self.config) and prepared_pairs(self.run) is None:
            Prepare(self.config, self.run).complete()
        manifest = self.ensure_manifest()
        console.print(f"[bold]training[/]  {manifest['steps']} steps: {_losses(manifest['last'])}")
        return manifest

    def make(self) -> Manifest:
        """Train from the newest intact checkpoint to the end."""
        config, run, started = self.config, self.run, time.perf_counter()
        rows = training_rows(config, run)
        steps = self._fit(rows)
        record = TrainingRecord(
            steps=steps,
            seconds=time.perf_counter() - started,
            recoveries=MetricsLog(run.recoveries).read(),
            pairs=pairs_account(run, rows),
            safety=safety_account(config, run),
            config=config.model_dump(),
            versions=versions(),
            weights=weights_digest(model_folder(config.model)),
            last=MetricsLog(run.metrics).read()[-1],
        )
        return write_manifest(self.manifest_file, self.fingerprint, **asdict(record))

    def status(self) -> StageStatus:
        """Steps and checkpoints, and what the last step showed."""
        run, config = self.run, self.config
        metrics = MetricsLog(run.metrics).read()
        last: dict[str, Any] = metrics[-1] if metrics else {}
        checkpoints = sorted_glob(run.train / "ray", "checkpoint_[0-9]*")  # Ray's own list is beside them
        begun = read_facts(run.train / "begun.json")
        recoveries = MetricsLog(run.recoveries).read()
        # A method, or data.select, may train on a part of the prepared pairs.
        pairs = begun.get("pairs") or prepared_pairs(run)
        return StageStatus.of(
            self.name,
            done=self.recorded() is not None,
            begun=bool(metrics),
            steps=int(last.get("step", 0)),
            of=plan_without_lengths(pairs, config.train, config.seed).total_steps if pairs else None,
            checkpoints=len(checkpoints),
            last_checkpoint=checkpoints[-1].name if checkpoints else None,
            recoveries=len(recoveries),
            workers=next((note["workers"] for note in reversed(recoveries) if "workers" in note), None),
            loss=last.get("loss"),
            tokens_per_second=last.get("tokens_per_second"),
        )

    def input_checks(self) -> Mapping[str, Check]:
        """The model can be read, and the adapters of `train.lora` fit it."""
        from bdpo.cluster.preflight import check_adapters, check_model

        return {"model": check_model, "adapters": check_adapters}

    def further_checks(self) -> Mapping[str, Check]:
        """Workers and batches go together."""
        from bdpo.cluster.preflight import check_batches

        return {"batches": check_batches}

    def dry_run(self) -> None:
        """Print steps, batches and memory of the training."""
        from pipelines.runtime.plan_table import print_plan

        print_plan(self.config)

    def _fit(self, scores: pa.Table) -> int:
        """Run Ray Train over the pairs of `scores` to the end; returns the number of optimizer steps."""
        from bdpo.training.tracking import Tracking
        from pipelines.runtime.plan_table import print_plan

        config, run, train = self.config, self.run, self.config.train
        _print_selection(config, run, scores.num_rows)
        steps = plan_without_lengths(scores.num_rows, train, config.seed).total_steps
        print_plan(config, scores.num_rows)
        connect()
        require_capacity(
            "train", train.min_workers, train.gpus_per_worker, accelerator=train.accelerator_type
        )
        with _progress(run, Tracking(config, run), steps):
            fit(config, run, scores, self.fingerprint)
        return steps


class OfTrainedModel(Stage):
    """A stage that works on the model that is trained in the run folder."""

    model_from = Train

    @property
    def has_inputs(self) -> bool:
        """Whether the model is trained."""
        return self.run.has_model()


def train_fingerprint(config: Config, run: RunDir) -> Fingerprint:
    """Everything that the trained model depends on, field by field.

    What is not in it may change between a kill and the resume.
    """
    sections = {"method": config.method.fingerprint(), "train": config.train.fingerprint()}
    select, read = config.data.select, score_fingerprint(config, run)
    if not requires_scores(config):
        del read["unconditional"]  # the pairs are read without a log-probability
    return {
        "scores": json_digest(read),
        "seed": config.seed,
        "data.select": select and select.model_dump(),
        **{f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()},
    }


def _print_selection(config: Config, run: RunDir, pairs: int) -> None:
    """Which of the prepared pairs are trained on, where that is not all of them."""
    safety = safety_account(config, run)
    if safety:
        console.print(
            f"[bold]safety[/]    {safety['kept']} pairs kept + {safety['swapped']} swapped (only "
            f"rejected is safe) + {safety['dropped']} dropped (both responses are unsafe)",
            soft_wrap=True,
        )
    if config.data.select:
        console.print(
            f"[bold]select[/]    {pairs} pairs of {count_pairs(run.pairs)} are trained on, see data.select",
            soft_wrap=True,
        )


@contextmanager
def _progress(run: RunDir, tracking: Tracking, total_steps: int) -> Iterator[None]:
    """A bar and trackers that follow the first worker's metrics.jsonl; a line for each recovery."""
    # On object storage each look at the log is a request, and its worker writes it no more often.
    seconds = 0.5 if isinstance(run.metrics, Path) else MetricsLog.WRITE_SECONDS
    stop, seen = threading.Event(), MetricsLog(run.recoveries).read()

    with progress_bar("train", total_steps) as advance:

        def follow() -> None:
            steps = 0
            while not stop.wait(seconds):
                rows, notes = tracking.follow(), MetricsLog(run.recoveries).read()
                for note in notes[len(seen) :]:
                    console.print(recovery_line(note))
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


def _progress_note(row: Mapping[str, float]) -> str:
    return f"{_losses(row)}, {row['tokens_per_second']:,.0f} tokens/s"


def _losses(row: Mapping[str, float]) -> str:
    """Loss of a step, and its rewards and that of held-out pairs where the row has them."""
    found = [f"loss {row['loss']:.3f}"]
    if "rewards/margins" in row:
        found.append(f"margin {row['rewards/margins']:.2f}")
        found.append(f"accuracy {row['rewards/accuracies']:.0%}")
    if "eval_loss" in row:
        found.append(f"eval loss {row['eval_loss']:.3f}")
    return ", ".join(found)


main = Command(__doc__, (Train,))

if __name__ == "__main__":
    main()
