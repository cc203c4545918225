"""What scoring holds in memory: beyond the weights with a wide vocabulary, and in the driver with many pairs.

    python -m benchmarks.memory

Each number is the peak of a process of its own, as the kernel counts it. The vocabulary is Qwen2's rounded
to 152,000, the rest of the model is small; rows have up to 1,000 tokens. The driver plans, resumes and
checks 200,000 synthetic pairs of which all but one shard are scored.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bdpo.config import Config, ModelConfig, parse_config
from bdpo.data.pairs import ID_COLUMNS, PAIR_SCHEMA, pairs_digest
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.reference import reference_logps
from bdpo.scoring.scores import SCORE_SCHEMA, score_fingerprint, score_store
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from benchmarks.common import apart, make_model, peak_memory, write_section
from pipelines import prepare, score
from pipelines.runtime import cluster

VOCABULARY, LONGEST, PAIRS = 152_000, 1000, 12
BUDGETS = (1024, 2048, 4096, 8192)
MANY, PART_ROWS, SHARD_ROWS, TEXT = 200_000, 20_000, 512, "fern " * 240


def main() -> None:
    """Measure both and write the section."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    rows = ["| tokens_per_batch | peak beyond weights, MiB |", "|---|---|"]
    rows += [f"| {budget} | {apart(beyond_weights, budget):.0f} |" for budget in BUDGETS]
    logits = VOCABULARY * 4 / 2**20
    with tempfile.TemporaryDirectory() as folder:
        config = many_pairs(Path(folder))
        started, peak = apart(driver, config)
    rows += [
        "",
        f"Vocabulary of {VOCABULARY:,}, float32, {PAIRS} pairs of up to {LONGEST} tokens, all four terms "
        f"and CHES. The logits of one such row alone would be {logits * LONGEST:.0f} MiB, those of a batch "
        f"of {BUDGETS[-1]} tokens {logits * BUDGETS[-1]:.0f}.",
        "",
        f"Driver, {MANY:,} pairs whose texts are {MANY * len(TEXT) / 2**20:.0f} MiB: {started:.0f} MiB once "
        f"all is imported, {peak:.0f} at its peak of planning, resuming and checking.",
    ]
    print(*rows, sep="\n")
    write_section("Scoring: memory", rows)


def beyond_weights(tokens_per_batch: int) -> float:
    """MiB that `reference_logps` adds to a process in which the model is."""
    torch.set_num_threads(1)
    shape = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LogpsModel(Qwen2ForCausalLM(shape), LONGEST).eval()
    rng = random.Random(0)

    def ids(most: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(most // 2, most))]

    longest = [[1] * 200, [2] * 400, [3] * 400]
    pairs = PrefixGroups.of([longest, *([ids(200), ids(400), ids(400)] for _ in range(PAIRS - 1))])
    reference_logps(model, PrefixGroups.of([[[1], [2], [3]]]), [1], tokens_per_batch)  # torch's set-up
    before = peak_memory()
    reference_logps(model, pairs, [1] * 20, tokens_per_batch)
    return peak_memory() - before


def driver(config: Config) -> tuple[float, float]:
    """(MiB once all is imported, MiB at the end) of the command that scores."""
    os.environ["RAY_ADDRESS"] = "local"
    cluster.connect()
    import ray.data  # noqa: F401 (what the command imports later)

    started = peak_memory()
    run = RunDir(config.run_dir)
    prepare.Prepare(config, run).complete()
    score.Score(config, run).complete()
    return started, peak_memory()


def many_pairs(folder: Path) -> Config:
    """A run folder with so many prepared pairs, and scores of all but the last shard."""
    chat = load_tokenizer(ModelConfig(name_or_path="sandbox"))
    make_model(len(chat.tokenizer)).save_pretrained(folder / "model")
    chat.tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "", "chosen": TEXT, "rejected": "no"}) + "\n")
    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": str(folder / "pairs.jsonl"), "max_length": 128, "max_prompt_length": 96},
        "score": {"tokens_per_batch": 4096, "shard_rows": SHARD_ROWS, "gpus_per_worker": 0},
    }
    config = parse_config(values, "benchmark")
    run = RunDir(config.run_dir)
    run.open(config).release()
    run.pairs.mkdir(parents=True)
    for first in range(0, MANY, PART_ROWS):
        ids = [f"{row:032d}" for row in range(first, first + PART_ROWS)]
        columns: dict[str, Any] = {name: [None] * PART_ROWS for name in PAIR_SCHEMA.names}
        columns |= {"pair_id": ids, "prompt": [[{"role": "user", "content": pair_id}] for pair_id in ids]}
        columns |= {"chosen": [TEXT] * PART_ROWS, "rejected": ["no"] * PART_ROWS}
        columns |= {name: [[1] * 240] * PART_ROWS for name in ID_COLUMNS}
        table = pa.table(columns, schema=PAIR_SCHEMA)
        pq.write_table(table, run.pairs / f"part-{first // PART_ROWS:05d}.parquet", row_group_size=512)
    counts = {"rows": MANY, "kept": MANY, "quarantined": {}, "excluded": {}, "not_sampled": 0}
    write_manifest(
        run.data / "manifest.json",
        prepare.Prepare(config, run).fingerprint,
        account=counts | {"format": "preference"},
        pairs_digest=pairs_digest(run.pairs),
    )
    store = score_store(run, score_fingerprint(config, run))
    work = json.dumps({"worker": "a", "seconds": 1, "tokens": 1, "tokens_forwarded": 1})
    for first, rows in store.missing(MANY, SHARD_ROWS)[:-1]:
        columns = {name: [1] * rows for name in SCORE_SCHEMA.names} | {"group": [None] * rows}
        columns["pair_id"] = [f"{row:032d}" for row in range(first, first + rows)]
        table = pa.table(columns, schema=SCORE_SCHEMA)
        store.write(first, table.replace_schema_metadata({"bdpo.work": work}))
    return config


if __name__ == "__main__":
    main()
