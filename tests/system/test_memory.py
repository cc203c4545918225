"""What processes of their own use of this machine's memory, and one that has too little of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdpo.data.pairs import ID_COLUMNS, PAIR_SCHEMA, pairs_digest
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.scores import SCORE_SCHEMA, score_fingerprint, score_store
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from pipelines import prepare
from tests.support import ROOT
from tests.support.helpers import PEAK, save_model, tiny_config, write_jsonl

SCORE_IN_LITTLE_MEMORY = """
import resource
import torch
from tests.support.helpers import encoded_pairs, tiny_qwen2
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.scoring import reference
model, pairs = LogpsModel(tiny_qwen2(), 512), PrefixGroups.of(encoded_pairs([(100, 200, 200)] * 64))
reference.reference_logps(model, pairs[[0]], [1], 500)
halved = []
really = reference._replanned_with_half_the_tokens
reference._replanned_with_half_the_tokens = lambda *args: halved.append(1) or really(*args)
expected, _ = reference.reference_logps(model, pairs, [1], 1000)
assert not halved
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
ours, _ = reference.reference_logps(model, pairs, [1], 64 * 500)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for name in expected:
    torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-4)
print(len(halved))
"""


def test_memory_of_this_machine_that_really_runs_out():
    """A limit on the address space: the allocator's own error."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCORE_IN_LITTLE_MEMORY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


SCORE_A_WIDE_VOCABULARY = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from bdpo.models.logps import LogpsModel, pair_logps
from bdpo.models.packing import PrefixGroups
config = Qwen2Config(vocab_size=152_000, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
model = LogpsModel(Qwen2ForCausalLM(config), max_length=4096)
pairs = PrefixGroups.of([([7] * 40, [8] * 2000, [9] * 2000)])
with torch.no_grad():
    print(pair_logps(model, model.layout.pack(pairs))[0].tolist())
print(peak())
"""


def test_a_vocabulary_of_152000_scores_within_2_gib():
    """4,000 response tokens: their logits alone would be 2.3 GiB in float32."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + SCORE_A_WIDE_VOCABULARY], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 2


RESUME = """
import sys

from bdpo.config import load_config
from bdpo.storage.run_dir import RunDir
from bdpo.storage.manifests import write_manifest
from pipelines import prepare, score
from pipelines.runtime import cluster
config = load_config(sys.argv[1])
cluster.connect()
import ray.data, torch, transformers
started = peak()
run = RunDir(config.run_dir)
prepare.Prepare(config, run).complete()
manifest = score.Score(config, run).complete()
print("peak", manifest["rows"], started, peak())
"""


@pytest.mark.ray
def test_the_drivers_memory_does_not_grow_with_the_pairs(tmp_path, tiny_chat):
    """100,000 pairs whose texts alone are 480 MB: planned, resumed and checked within 1 GiB."""
    count, part_rows, text = 100_000, 20_000, "fern " * 480
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "", "chosen": text, "rejected": text}])
    model = save_model(tmp_path / "model", tiny_chat)
    config = tiny_config(tmp_path / "run", model, data, score={"shard_rows": 512})
    run = RunDir(config.run_dir)
    run.open(config).release()
    run.pairs.mkdir(parents=True)
    chat, compared = load_tokenizer(config.model), count // prepare.FAITHFUL_PAIRS
    for first in range(0, count, part_rows):
        ids = [f"{row:032d}" for row in range(first, first + part_rows)]
        prompts = [[{"role": "user", "content": pair_id}] for pair_id in ids]
        texts = {
            "pair_id": ids,
            "prompt": prompts,
            "chosen": [text] * part_rows,
            "rejected": ["no"] * part_rows,
        }
        others = {name: [None] * part_rows for name in ("group", "chosen_safe", "rejected_safe", "context")}
        others |= {name: [[1] * 240] * part_rows for name in ID_COLUMNS}
        for row in range(-first % compared, part_rows, compared):  # these are compared with their texts
            prompt = chat.prompt_ids(prompts[row])
            responses = (
                chat.response_ids(response)[: config.data.max_length - len(prompt)]
                for response in (text, "no")
            )
            for name, tokens in zip(ID_COLUMNS, (prompt, *responses), strict=True):
                others[name] = [*others[name][:row], tokens, *others[name][row + 1 :]]
        table = pa.table(texts | others, schema=PAIR_SCHEMA)
        pq.write_table(table, run.pairs / f"part-{first // part_rows:05d}.parquet", row_group_size=512)
    account = {"rows": count, "kept": count, "quarantined": {}, "excluded": {}, "not_sampled": 0}
    manifest = {"account": account | {"format": "preference"}, "pairs_digest": pairs_digest(run.pairs)}
    write_manifest(run.data / "manifest.json", prepare.Prepare(config, run).fingerprint, **manifest)
    store = score_store(run, score_fingerprint(config, run))
    work = {"worker": "a", "seconds": 1, "tokens": 1, "tokens_forwarded": 1}
    for first, rows in store.missing(count, 512)[:-1]:
        columns = {name: [1] * rows for name in SCORE_SCHEMA.names}
        columns |= {"pair_id": [f"{row:032d}" for row in range(first, first + rows)], "group": [None] * rows}
        table = pa.table(columns, schema=SCORE_SCHEMA)
        store.write(first, table.replace_schema_metadata({"bdpo.work": json.dumps(work)}))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    arguments = [sys.executable, "-c", PEAK + RESUME, str(tmp_path / "config.yaml")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, started, peak = (float(number) for number in done.stdout.splitlines()[-1].split()[1:])
    assert rows == count
    assert peak < 1
    assert peak - started < 0.2, (started, peak)
