"""The run folder: where every stage puts its results, and how a finished stage is known again.

    <run_dir>/config.yaml            the resolved config of the last command
    <run_dir>/data/pairs/*.parquet   prepared pairs, and data/manifest.json: the account of every row
    <run_dir>/scores/*.parquet       one row of scores a pair, and scores/manifest.json
    <run_dir>/train/                 checkpoints, and train/manifest.json
    <run_dir>/model/                 the trained model, as from_pretrained loads it
    <run_dir>/metrics.jsonl          one line an optimizer step
    <run_dir>/eval/<name>/           per-item scores and summary.json of the model of that name
    <run_dir>/report/                summary and figures
    <run_dir>/tune/                  the trials of a search, their table, figures and best.yaml
    <run_dir>/private/               quarantined rows and generated text; mode 0700

A stage writes its manifest last. The manifest carries the fingerprint of all that went in, so a stage
whose inputs changed is refused instead of being taken for finished.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bdpo.config import Config
from bdpo.errors import UserError

Fingerprint = dict[str, Any]  # field name -> JSON value


class RunDir:
    """Paths inside one run folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()
        self.config = self.root / "config.yaml"
        self.data = self.root / "data"
        self.pairs = self.data / "pairs"
        self.scores = self.root / "scores"
        self.train = self.root / "train"
        self.model = self.root / "model"
        self.metrics = self.root / "metrics.jsonl"
        self.report = self.root / "report"
        self.tune = self.root / "tune"
        self.private = self.root / "private"

    def results(self) -> list[Path]:
        """All that a run makes, its config and lock aside."""
        made = [self.data, self.scores, self.train, self.model, self.metrics, self.report]
        return [*made, self.root / "eval", self.private / "responses"]

    def eval(self, name: str) -> Path:
        """Results of the evaluated model called `name`."""
        return self.root / "eval" / name

    def responses(self, name: str) -> Path:
        """What the evaluated model called `name` generated."""
        return self.private / "responses" / name

    def part(self, *names: str) -> RunDir:
        """A run folder inside this one's `tune`: results of its own, with this run's pairs and scores."""
        part = RunDir(self.tune.joinpath(*names))
        part.data, part.pairs, part.scores = self.data, self.pairs, self.scores
        part.private = self.private.joinpath("tune", *names)
        return part

    def open(self, config: Config) -> FileLock:
        """Make the folder, or find it again, for this command alone; returns the lock that says so.

        Raises:
            UserError: it cannot be written, is not a run folder and not empty, or another command is at it.
        """
        if not self.config.is_file() and any(self.root.glob("[!.]*")):
            raise UserError(f"run_dir={self.root}: not empty, and not a run folder (no config.yaml)")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".lock")
            lock.acquire(timeout=0)
            if not self.config.exists():
                self.record(config)
            self.private.mkdir(exist_ok=True)
            self.private.chmod(0o700)
        except Timeout:
            raise UserError(f"run_dir={self.root}: another command is at work in it") from None
        except OSError as error:
            raise UserError(f"run_dir={self.root}: cannot be written ({error.strerror})") from None
        return lock

    def record(self, config: Config) -> None:
        """Keep the resolved config of the command that did the last work here."""
        write_text(self.config, config.to_yaml())


def write_text(file: Path, text: str, mode: int = 0o644) -> None:
    """Write a whole text file or none."""
    write_bytes(file, text.encode(), mode)


def write_bytes(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a whole file or none: temporary name, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def write_manifest(file: Path, fingerprint: Fingerprint, **results: Any) -> dict[str, Any]:
    """Mark a stage as finished: its fingerprint and what there is to know of its results."""
    manifest = {"version": 1, "fingerprint": fingerprint, **results}
    write_text(file, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def read_manifest(file: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, None before.

    Raises:
        UserError: the file is not a manifest.
    """
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        manifest["fingerprint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a manifest of bdpo; fresh=true starts over") from None
    return manifest


def finished(file: Path, fingerprint: Fingerprint) -> dict[str, Any] | None:
    """The manifest if the stage is done with these inputs, None if it is not done.

    Raises:
        UserError: it was done with other inputs; the message names the first field that differs.
    """
    manifest = read_manifest(file)
    if manifest is not None:
        refuse_other(file, manifest["fingerprint"], fingerprint)
    return manifest


def refuse_other(what: Path, made_with: Fingerprint, now: Fingerprint) -> None:
    """Raise a UserError that names the first field in which two fingerprints differ, if any does."""
    for field in [*now, *(name for name in made_with if name not in now)]:
        old, new = made_with.get(field), now.get(field)
        if old != new:
            raise UserError(
                f"{what}: made with {field}={old}, now it is {new}; "
                "use another run_dir, or fresh=true to start over"
            )


def discard(*paths: Path) -> None:
    """Remove files and folders of a run that starts over."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class MetricsLog:
    """`metrics.jsonl`: one line an optimizer step, written by one worker."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def keep(self, steps: int) -> None:
        """Drop what was logged after the checkpoint that training resumes from."""
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.read() if row["step"] <= steps))

    def append(self, metrics: dict[str, float]) -> None:
        """Add the metrics of a step."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")

    def read(self) -> list[dict[str, float]]:
        """All whole lines; one that a killed process left unfinished does not count."""
        if not self.file.exists():
            return []
        *lines, _ = self.file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]
