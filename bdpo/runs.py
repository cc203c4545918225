"""The run folder: where every stage puts its results, and how a finished stage is known again.

    <run_dir>/config.yaml            the resolved config of the last command
    <run_dir>/data/pairs/*.parquet   prepared pairs, and data/manifest.json: the account of every row
    <run_dir>/scores/*.parquet       one row of scores a pair, and scores/manifest.json
    <run_dir>/train/                 checkpoints, recoveries.jsonl, and train/manifest.json
    <run_dir>/model/                 the trained model, as from_pretrained loads it
    <run_dir>/adapter/               the LoRA adapter that is merged into it, as PEFT loads it
    <run_dir>/metrics.jsonl          one line an optimizer step
    <run_dir>/eval/<name>/           per-item scores and summary.json of the model of that name
    <run_dir>/report/                summary and figures
    <run_dir>/tune/                  the trials of a search, their table, figures and best.yaml
    <run_dir>/experiments/arms/      the trainings of all experiments
    <run_dir>/experiments/<name>/    tables, figures and report.html of an experiment
    <run_dir>/private/               quarantined rows and generated text; mode 0700

It is a local or mounted folder, or one on object storage (`s3://bucket/prefix`): see `bdpo.storage`.
A stage writes its manifest last. The manifest carries the fingerprint of all that went in, so a stage
whose inputs changed is refused instead of being taken for finished.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.storage import (
    Lease,
    StoragePath,
    error_line,
    lock,
    lock_holder,
    read_text,
    storage_path,
    write_text,
)

Fingerprint = dict[str, Any]  # field name -> JSON value

VERSION = 1  # of what manifests hold and of the results that they stand for


class RunDir:
    """Paths inside one run folder."""

    def __init__(self, root: str | StoragePath) -> None:
        self.root = storage_path(root, "run_dir")
        self.config = self.root / "config.yaml"
        self.data = self.root / "data"
        self.pairs = self.data / "pairs"
        self.scores = self.root / "scores"
        self.train = self.root / "train"
        self.model = self.root / "model"
        self.recoveries = self.train / "recoveries.jsonl"
        self.adapter = self.root / "adapter"
        self.metrics = self.root / "metrics.jsonl"
        self.report = self.root / "report"
        self.tune = self.root / "tune"
        self.private = self.root / "private"

    def results(self) -> list[StoragePath]:
        """All that a run makes, its config and lock aside."""
        made = [self.data, self.scores, self.train, self.model, self.adapter, self.metrics, self.report]
        return [*made, self.root / "eval", self.private / "responses"]

    def eval(self, name: str) -> StoragePath:
        """Results of the evaluated model called `name`."""
        return self.root / "eval" / name

    def responses(self, name: str) -> StoragePath:
        """What the evaluated model called `name` generated."""
        return self.private / "responses" / name

    def part(self, *names: str) -> RunDir:
        """A run folder inside this one: results of its own, with this run's pairs and scores."""
        part = RunDir(self.root.joinpath(*names))
        part.data, part.pairs, part.scores = self.data, self.pairs, self.scores
        part.private = self.private.joinpath(*names)
        return part

    def has_model(self) -> bool:
        """Whether the trained model is there; it is whole then."""
        return (self.model / "config.json").is_file()

    def has_adapter(self) -> bool:
        """Whether the adapter that was trained with LoRA is there; it is whole then."""
        return (self.adapter / "adapter_config.json").is_file()

    def open(self, config: Config) -> FileLock | Lease:
        """Make the folder, or find it again, for this command alone; returns the lock that says so.

        Raises:
            UserError: it cannot be written, is not a run folder and not empty, or another command is at it.
        """
        try:
            return self._open(config)
        except Timeout:
            holder = lock_holder(self.root)
            raise UserError(f"run_dir={self.root}: another command is at work in it{holder}") from None
        except UserError:
            raise
        except Exception as error:  # every protocol of fsspec has errors of its own
            if isinstance(self.root, Path) and not isinstance(error, OSError):
                raise
            raise UserError(f"run_dir={self.root}: cannot be written ({error_line(error)})") from None

    def _open(self, config: Config) -> FileLock | Lease:
        if not self.config.is_file() and any(self.root.glob("[!.]*")):
            raise UserError(f"run_dir={self.root}: not empty, and not a run folder (no config.yaml)")
        if isinstance(self.root, Path):
            self.root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as on_failure:
            held = on_failure.push(lock(self.root))
            if not self.config.exists():
                self.record(config)
            if isinstance(self.private, Path):
                self.private.mkdir(exist_ok=True)
                self.private.chmod(0o700)
            on_failure.pop_all()
        return held

    def record(self, config: Config) -> None:
        """Keep the resolved config of the command that did the last work here."""
        write_text(self.config, config.to_yaml())


def write_manifest(file: StoragePath, fingerprint: Fingerprint, **results: Any) -> dict[str, Any]:
    """Mark a stage as finished: its fingerprint and what there is to know of its results."""
    manifest = {"version": VERSION, "fingerprint": fingerprint, **results}
    write_text(file, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def read_manifest(file: StoragePath) -> dict[str, Any] | None:
    """The manifest of a finished stage, None before.

    Raises:
        UserError: the file is not a manifest, or is one of another version of bdpo.
    """
    try:
        manifest: dict[str, Any] = json.loads(read_text(file))
        version, _ = manifest["version"], manifest["fingerprint"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a manifest of bdpo; fresh=true starts over") from None
    if version != VERSION:
        raise UserError(
            f"{file}: version={version}, this bdpo reads and writes {VERSION}; "
            "use another run_dir, or fresh=true to start over"
        )
    return manifest


def finished(file: StoragePath, fingerprint: Fingerprint) -> dict[str, Any] | None:
    """The manifest if the stage is done with these inputs, None if it is not done.

    Raises:
        UserError: it was done with other inputs; the message names the first field that differs.
    """
    manifest = read_manifest(file)
    if manifest is not None:
        refuse_other(file, manifest["fingerprint"], fingerprint)
    return manifest


def refuse_other(what: object, made_with: Fingerprint, now: Fingerprint) -> None:
    """Raise a UserError that names the first field in which two fingerprints differ, if any does."""
    for field in [*now, *(name for name in made_with if name not in now)]:
        old, new = made_with.get(field), now.get(field)
        if old != new:
            raise UserError(
                f"{what}: made with {field}={old}, now it is {new}; "
                "use another run_dir, or fresh=true to start over"
            )


class MetricsLog:
    """`metrics.jsonl`: one line an optimizer step, written by one worker; `recoveries.jsonl` likewise.

    An object cannot be appended to: on object storage the worker keeps the lines and writes all of them, at
    intervals of `WRITE_SECONDS` and before a checkpoint.
    """

    WRITE_SECONDS = 10.0

    def __init__(self, file: StoragePath) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] | None = None  # of object storage: what was read, and came after
        self.written = -math.inf

    def keep(self, steps: int) -> None:
        """Drop what was logged after the checkpoint that training resumes from."""
        self.rows = [row for row in self.read() if row["step"] <= steps]
        write_text(self.file, _lines(self.rows))

    def append(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of a step."""
        if isinstance(self.file, Path):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(_lines([metrics]))
            return
        self.rows = [*(self.read() if self.rows is None else self.rows), metrics]
        if time.monotonic() - self.written > self.WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Have all lines in the run folder: before a checkpoint, which counts on those of its steps."""
        if not isinstance(self.file, Path) and self.rows is not None:
            write_text(self.file, _lines(self.rows))
            self.written = time.monotonic()

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; one that a killed process left unfinished does not count."""
        try:
            *lines, _ = read_text(self.file).split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
