"""A run folder with many prepared pairs of random token ids, as long as safety data, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bdpo.config import Config, ModelConfig, parse_config
from bdpo.data.pairs import ID_COLUMNS, PAIR_SCHEMA, pairs_digest
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.scores import SCORE_SCHEMA, TOKEN_COLUMNS
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from benchmarks.common import EMPTY_TURN, MAX_LENGTH, MAX_PROMPT_LENGTH, make_model

PART_ROWS = 4096  # as `prepare` writes them

SHARD, BATCH, BUDGET = 512, 64, 16384


def prepared(folder: Path, pairs: int) -> tuple[Config, pa.Table]:
    """A run folder with so many prepared pairs of random ids, and their scores."""
    chat = load_tokenizer(ModelConfig(name_or_path="sandbox"))
    make_model(len(chat.tokenizer)).save_pretrained(folder / "model")
    chat.tokenizer.save_pretrained(folder / "model")
    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": "x", "max_length": MAX_LENGTH, "max_prompt_length": MAX_PROMPT_LENGTH},
        "train": {"global_batch_size": BATCH, "tokens_per_micro_batch": BUDGET},
    }
    config = parse_config(values, "benchmark")
    run = RunDir(config.run_dir)
    run.pairs.mkdir(parents=True)
    rng, tables = np.random.default_rng(0), []
    for number, first in enumerate(range(0, pairs, PART_ROWS)):
        part, scores = random_part(rng, first, min(PART_ROWS, pairs - first))
        pq.write_table(part, run.pairs / f"part-{number:05d}.parquet", row_group_size=SHARD)
        tables += [scores.slice(start, SHARD) for start in range(0, len(scores), SHARD)]  # as they are read
    write_manifest(run.data / "manifest.json", {}, pairs_digest=pairs_digest(run.pairs))
    return config, pa.concat_tables(tables)


def random_part(rng: np.random.Generator, first: int, rows: int) -> tuple[pa.Table, pa.Table]:
    """Prepared pairs of random ids from a row on, and their scores."""
    drawn = np.exp(rng.normal([3.2, 4.65, 4.65], 0.6, (rows, 3))) + np.array([EMPTY_TURN, 1, 1])
    lengths = np.minimum(drawn, [MAX_PROMPT_LENGTH, 400, 400]).astype(np.int32)
    columns: dict[str, Any] = {field.name: pa.nulls(rows, field.type) for field in PAIR_SCHEMA}
    columns["pair_id"] = [f"{row:064d}" for row in range(first, first + rows)]
    columns["prompt"] = [[{"role": "user", "content": "fern " * 30}]] * rows
    columns |= {"chosen": ["fern " * 100] * rows, "rejected": ["amber " * 100] * rows}
    for name, counts in zip(ID_COLUMNS, lengths.T, strict=True):
        offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        columns[name] = pa.ListArray.from_arrays(offsets, rng.integers(0, 50_000, offsets[-1], np.int32))
    scores: dict[str, Any] = {name: rng.normal(0, 1, rows) for name in SCORE_SCHEMA.names}
    scores |= {"pair_id": columns["pair_id"], "group": columns["group"]}
    scores |= dict(zip(TOKEN_COLUMNS, lengths.T, strict=True))
    return pa.table(columns, schema=PAIR_SCHEMA), pa.table(scores, schema=SCORE_SCHEMA)
