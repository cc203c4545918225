"""The run folder: where every stage puts its results, and how a finished stage is known again.

    <run_dir>/config.yaml            the resolved config of the last command
    <run_dir>/data/pairs/*.parquet   prepared pairs, and data/manifest.json: the account of every row
    <run_dir>/scores/*.parquet       one row of scores a pair, and scores/manifest.json
    <run_dir>/train/                 checkpoints, recoveries.jsonl, and train/manifest.json
    <run_dir>/model/                 the trained model, as from_pretrained loads it
    <run_dir>/adapter/               the LoRA adapter that is merged into it, as PEFT loads it
    <run_dir>/metrics.jsonl          one line an optimizer step
    <run_dir>/eval/<name>/           per-item scores and summary.json of the model of that name
    <run_dir>/tamper/                the training of a tamper test, a run folder of its own
    <run_dir>/attack/<kind>/<name>/  the numbers of an attack on the model of that name, without a text
    <run_dir>/report/                summary and figures
    <run_dir>/tune/                  the trials of a search, their table, figures and best.yaml
    <run_dir>/experiments/arms/      the trainings of all experiments
    <run_dir>/experiments/<name>/    tables, figures and report.html of an experiment
    <run_dir>/private/               quarantined rows and generated text; mode 0700

It is a local or mounted folder, or one on object storage (`s3://bucket/prefix`): see `bdpo.storage.paths`.
A stage writes its manifest last. The manifest carries the fingerprint of all that went in, so a stage
whose inputs changed is refused instead of being taken for finished.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import yaml
from filelock import Timeout

from bdpo.config import Config, recorded_config
from bdpo.errors import UserError, error_line
from bdpo.storage.digests import json_digest
from bdpo.storage.lease import HeldFolder, Lease, lock, lock_holder
from bdpo.storage.paths import (
    StoragePath,
    read_text,
    remove_temporary_files,
    storage_path,
    write_text,
)

# The last line of config.yaml, a comment: a digest of the lines above it.
_DIGEST_LINE = "# digest: "


class RunDir:
    """Paths inside one run folder; pairs, scores and private files may be another run's."""

    def __init__(
        self,
        root: str | StoragePath,
        data: StoragePath | None = None,
        scores: StoragePath | None = None,
        private: StoragePath | None = None,
    ) -> None:
        self.root = storage_path(root, "run_dir")
        self.config = self.root / "config.yaml"
        self.data = data or self.root / "data"
        self.pairs = self.data / "pairs"
        self.scores = scores or self.root / "scores"
        self.train = self.root / "train"
        self.model = self.root / "model"
        self.recoveries = self.train / "recoveries.jsonl"
        self.adapter = self.root / "adapter"
        self.metrics = self.root / "metrics.jsonl"
        self.report = self.root / "report"
        self.tune = self.root / "tune"
        self.private = private or self.root / "private"

    def eval(self, name: str) -> StoragePath:
        """Results of the evaluated model called `name`."""
        return self.root / "eval" / name

    def responses(self, name: str) -> StoragePath:
        """What the evaluated model called `name` generated."""
        return self.private / "responses" / name

    def replies(self, name: str) -> StoragePath:
        """What a judge wrote about the answers of the evaluated model called `name`."""
        return self.private / "replies" / name

    def attack(self, kind: str, name: str) -> StoragePath:
        """Numbers of an attack of a kind on the model called `name`."""
        return self.root / "attack" / kind / name

    def attack_texts(self, kind: str, name: str) -> StoragePath:
        """Prompts and answers of that attack."""
        return self.private / "attack" / kind / name

    def part(self, *names: str) -> RunDir:
        """A run folder inside this one: results of its own, with this run's pairs and scores."""
        return RunDir(self.root.joinpath(*names), self.data, self.scores, self.private.joinpath(*names))

    def search_base(self, part: str) -> RunDir:
        """The run folder of a search's base model on a part of the prompts, `search` or `held_out`."""
        return self.part("tune", "base", part)

    def with_scores(self, scores: StoragePath) -> RunDir:
        """This run folder with the scores of another folder."""
        return RunDir(self.root, self.data, scores, self.private)

    def tampering(self, own_data: bool) -> RunDir:
        """The run folder of the tamper test; its pairs are this run's unless it has data of its own."""
        root = self.root / "tamper"
        return RunDir(root, root / "data" if own_data else self.data, private=self.private / "tamper")

    def has_model(self) -> bool:
        """Whether the trained model is there, which is written complete or not at all."""
        return (self.model / "config.json").is_file()

    def has_adapter(self) -> bool:
        """Whether the adapter of LoRA is there, which is written complete or not at all."""
        return (self.adapter / "adapter_config.json").is_file()

    def open(self, config: Config) -> HeldFolder | Lease:
        """Make the folder, or find it again, for this command alone; returns the lock of the folder.

        Raises:
            UserError: it cannot be written, is not a run folder and not empty, or another command uses it.
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

    def _open(self, config: Config) -> HeldFolder | Lease:
        if not self.config.is_file() and any(self.root.glob("[!.]*")):
            raise UserError(f"run_dir={self.root}: not empty, and not a run folder (no config.yaml)")
        if isinstance(self.root, Path):
            self.root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as on_failure:
            held = on_failure.push(lock(self.root))
            remove_temporary_files(self.root)  # of commands that were killed while they wrote
            if not self.config.exists():
                self.record(config)
            if isinstance(self.private, Path):
                self.private.mkdir(exist_ok=True)
                self.private.chmod(0o700)
            on_failure.pop_all()
        return held

    def record(self, config: Config) -> None:
        """Keep the resolved config of the command that worked here last; a comment below holds its digest."""
        text = config.to_yaml()
        write_text(self.config, f"{text}{_DIGEST_LINE}{json_digest(text)}\n")


def run_config(run: RunDir) -> Config:
    """The config of the last command in a run folder.

    Raises:
        UserError: there is no run in the folder, or its config is damaged.
    """
    try:
        text, _, digest = read_text(run.config).rpartition(_DIGEST_LINE)
        if digest.strip() != json_digest(text):
            raise ValueError("the digest does not match")
        return recorded_config(yaml.safe_load(text), str(run.config))
    except (ValueError, yaml.YAMLError):
        raise UserError(
            f"{run.config}: damaged, or not written by this version of bdpo; "
            "the next command with a config of its own writes it anew"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run.root}: no run folder (it has no config.yaml)") from None
