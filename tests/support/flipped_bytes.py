"""Bytes that are flipped in the files of a run folder, and what the readers of the files make of it.

One byte of one file is changed at a time; then everything that a later command decides by is read. A flip is
`refused` (one line, a `UserError`), `dropped` (a log line is left out, a checkpoint has a defect), `harmless`
(what is read is the same), `silent` (something else is read), or a `traceback`. The last two are faults.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from bdpo.config import ModelConfig
from bdpo.data.pairs import PAIR_SCHEMA, pairs_digest
from bdpo.errors import UserError
from bdpo.evaluation.answers import RESPONSE_SCHEMA
from bdpo.evaluation.measures import VERDICT_SCHEMA, summarise
from bdpo.experiments.arms import Arm, ExperimentRecord
from bdpo.models.loading import model_folder
from bdpo.scoring.scores import SCORE_SCHEMA, checked_pairs_digest, finished_scores, score_store
from bdpo.search.sweep import Sweep
from bdpo.stats import Estimate
from bdpo.storage.checksums import write_checksums
from bdpo.storage.digests import sha256
from bdpo.storage.manifests import read_manifest, write_manifest
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import read_parquet, write_parquet
from bdpo.storage.run_dir import RunDir, run_config
from bdpo.storage.shards import ShardStore
from bdpo.training.checkpoints import CheckpointPart, TrainProgress, part_defect
from bdpo.variants.ends import End, Failure
from bdpo.variants.objective import Measured
from tests.support.helpers import tiny_config

Reader = Callable[[], Any]

FAULTS = ("silent", "traceback")


def small_run(folder: Path) -> RunDir:
    """A run folder with a file of every kind that is read again."""
    run = RunDir(folder)
    run.open(tiny_config(folder, folder / "no model", folder / "no data")).release()
    pair = dict.fromkeys(PAIR_SCHEMA.names) | {"prompt": [], "chosen": "yes", "rejected": "no"}
    score = dict.fromkeys(SCORE_SCHEMA.names, 1.0) | {"group": "safe", "ches": None}
    score |= {f"{part}_tokens": 3 for part in ("prompt", "chosen", "rejected")}
    ids = [{"pair_id": str(number)} for number in range(20)]
    run.pairs.mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist([pair | row for row in ids], schema=PAIR_SCHEMA),
        run.pairs / "part-00000.parquet",
    )
    write_manifest(run.data / "manifest.json", {"data.path": "x"}, pairs_digest=pairs_digest(run.pairs))
    scores = pa.Table.from_pylist([score | row for row in ids], schema=SCORE_SCHEMA)
    for first in (0, 10):
        score_store(run, {"weights": "x"}).write(first, scores.slice(first, 10))
    write_manifest(run.scores / "manifest.json", {"weights": "x"}, rows=20, seconds=1.0, workers={})
    for name in ("begun", "manifest"):
        write_manifest(run.train / f"{name}.json", {"seed": 0}, workers=2, pairs=20, committed=3)
    for step in range(1, 6):
        MetricsLog(run.metrics).append({"step": step, "loss": 1 / step})
        MetricsLog(run.recoveries).append({"step": step, "reached": step, "checkpoint": "c", "damaged": {}})
    _checkpoint(run.train / "ray" / "checkpoint_1", workers=2)
    _export(run)
    _evaluate(run)
    _record_variants(run)
    return run


def _export(run: RunDir) -> None:
    """A folder that passes for the trained model."""
    run.model.mkdir()
    (run.model / "config.json").write_text('{"model_type": "qwen2"}')
    (run.model / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"weight": np.arange(9, dtype=np.float32)}, run.model / "model.safetensors")
    write_checksums(run.model)


def _evaluate(run: RunDir) -> None:
    """An evaluation of the base model: answers, verdicts, scores and summary."""
    verdict = dict.fromkeys(VERDICT_SCHEMA.names) | {"new_tokens": 3}
    verdict |= {"benchmark": "strongreject", "category": "x", "harm": 0.5}
    verdict |= {"should_comply": False, "flagged": False}
    items = [str(number) for number in range(12)]
    verdicts = pa.Table.from_pylist([verdict | {"item_id": item} for item in items], schema=VERDICT_SCHEMA)
    answer = {"response": "no", "new_tokens": 3, "cut": False, "finite": True}
    answers = pa.Table.from_pylist([answer | {"item_id": item} for item in items], schema=RESPONSE_SCHEMA)
    for first in (0, 6):
        _answers(run).write(first, answers.slice(first, 6))
        _verdicts(run).write(first, verdicts.slice(first, 6))
    write_parquet(run.eval("base") / "scores.parquet", verdicts)
    write_manifest(run.eval("base") / "summary.json", {}, **summarise(verdicts).to_json())


def _answers(run: RunDir) -> ShardStore:
    return ShardStore(run.responses("base"), RESPONSE_SCHEMA, {"weights": "x"}, mode=0o600)


def _verdicts(run: RunDir) -> ShardStore:
    return ShardStore(run.eval("base") / "shards", VERDICT_SCHEMA, {"judge": "x"})


def _record_variants(run: RunDir) -> None:
    """Two trials of a search, one of which failed, and an experiment with one arm."""
    sweep = Sweep(run_config(run), run, {"seed": 0})
    sweep.begin()
    for name in ("0000", "0001"):
        file = sweep.folder(name).root / "trial.json"
        write_manifest(file, sweep.fingerprint, params={"method.beta": 0.1}, begun=1.0)
    half = Estimate(0.5, 0.4, 0.6, 10, "exact")
    sweep.record_rung(sweep.trial("0000"), 4, Measured(half, half, 1.0, 0.1), 10.0, 3.0)
    sweep.record_failure("0001", Failure(End.LOST, "OSError: gone"))
    write_parquet(run.tune / "results.parquet", pa.table({"trial": ["0000", "0001"], "loss": [0.5, None]}))
    arms = run.part("experiments", "alpha").root
    ExperimentRecord(run_config(run), (Arm("dpo", {"method.name": "dpo"}),), notes=("short",)).write(arms)


def _checkpoint(folder: Path, workers: int) -> None:
    (folder / "state").mkdir(parents=True)
    for rank in range(workers):
        file = folder / "state" / f"{rank}.pt"
        file.write_bytes(random.Random(rank).randbytes(500))
        files = {f"state/{rank}.pt": {"size": 500, "sha256": sha256(file)}}
        part = CheckpointPart(workers, TrainProgress(3, 1.5, 900), {"loss": 0.5}, files)
        (folder / f"part-{rank}.json").write_text(part.to_json())


def readers(run: RunDir) -> dict[str, Reader]:
    """What later commands read in a run folder, by name; only what is there."""
    found: dict[str, Reader] = {"config": lambda: run_config(run)}
    for file in _manifests(run):
        found[str(file)] = lambda file=file: read_manifest(file)
    for file in _tables(run):
        found[str(file)] = lambda file=file: read_parquet(file).to_pylist()
    for store in (_answers(run), _verdicts(run)):
        if store.folder.exists():
            found[f"shards {store.folder}"] = lambda store=store: [t.to_pylist() for t in store.tables()]
    if (run.data / "manifest.json").exists():
        found["pairs"] = lambda: checked_pairs_digest(run)
    if (run.scores / "manifest.json").exists():
        found["scores"] = lambda: finished_scores(run)[1].to_pylist()
    for log in (run.metrics, run.recoveries):
        if log.exists():
            found[str(log)] = lambda log=log: MetricsLog(log).read()
    if run.has_model():
        found["model"] = lambda: _content(model_folder(ModelConfig(name_or_path=str(run.model))))
    for folder in sorted((run.train / "ray").glob("checkpoint_*")):
        found[str(folder)] = lambda folder=folder: list(_defects(folder))
    return found


def _manifests(run: RunDir) -> list[Path]:
    """The sealed JSON files of a run; those of checkpoints and models are parts of these."""
    found = sorted(run.root.rglob("*.json"))
    found = [file for file in found if run.model not in file.parents]
    return [file for file in found if not any(name.startswith("checkpoint_") for name in file.parts)]


def _content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _tables(run: RunDir) -> list[Path]:
    """The Parquet files that stand alone, with a digest in themselves."""
    return sorted(file for name in ("scores", "results") for file in run.root.rglob(f"{name}.parquet"))


def _defects(folder: Path) -> Iterator[str]:
    for rank in range(len(list(folder.glob("part-*.json")))):
        defect = part_defect(folder, rank)
        if defect:
            yield defect


def files_read(run: RunDir) -> list[Path]:
    """The files on which the readers depend."""
    named = {run.config, run.metrics, run.recoveries}
    named |= set(run.pairs.glob("*.parquet")) | set(run.scores.glob("*.parquet"))
    named |= {*_manifests(run), *_tables(run), *run.model.glob("*")}
    named |= {file for store in (_answers(run), _verdicts(run)) for file in store.folder.glob("*.parquet")}
    named |= {file for file in (run.train / "ray").glob("checkpoint_*/**/*") if file.is_file()}
    return sorted(file for file in named if file.exists() and file.stat().st_size)


def outcome(before: dict[str, Any], found: dict[str, Reader]) -> str:
    """What became of a flip; see the module."""
    worst = "harmless"
    for name, reader in found.items():
        try:
            now = reader()
        except UserError as error:
            worst = "traceback" if "\n" in str(error) else "refused"
            continue
        except Exception:
            return "traceback"
        if now == before[name]:
            continue
        shortened = name.endswith(".jsonl") or name.startswith("shards ")  # what is left out is made again
        is_checkpoint = "checkpoint_" in name
        if not (is_checkpoint and now) and not (shortened and all(row in before[name] for row in now)):
            return "silent"
        worst = "dropped"
    return worst


def flip(run: RunDir, flips: int, seed: int) -> Counter[tuple[str, str]]:
    """(kind of file, outcome) -> number of flips; every file is as before at the end."""
    rng, counts = random.Random(seed), Counter[tuple[str, str]]()
    found, files = readers(run), files_read(run)
    before = {name: reader() for name, reader in found.items()}
    for _ in range(flips):
        file = rng.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            counts[file.name if file.suffix != ".parquet" else file.parent.name, outcome(before, found)] += 1
        finally:
            file.write_bytes(content)
    return counts
