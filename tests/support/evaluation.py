"""An evaluation of a model that answers everything with a known text, judged over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml

from bdpo.evaluation.benchmarks import prefill, simpleqa, strongreject, xstest
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.benchmark_files import artifact, write_csv, write_json
from tests.support.chats import CHATML, byte_tokenizer
from tests.support.helpers import tiny_qwen2

PROMPT, ANSWER, JUDGED, KEY = (
    "canary-prompt-7c1e",
    "canary-answer-90b2",
    "canary-judge-44aa",
    "sk-canary-51d0",
)

SECRETS = {
    "JUDGE_KEY": KEY,
    "WANDB_API_KEY": "c0ffee51d0c0ffee51d0c0ffee51d0c0ffee51d0",
    "MLFLOW_TRACKING_TOKEN": "canary-token-6b1d",
    "MLFLOW_TRACKING_PASSWORD": "canary-password-a9e3",
}
"""Environment variables of nodes and commands, whose values appear nowhere."""

CANARIES = (PROMPT, ANSWER, JUDGED, *SECRETS.values())


def train_parrot(folder: Path) -> Path:
    """A model that was trained to answer everything with the answer canary."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    chat = ChatTokenizer(tokenizer)
    model = tiny_qwen2().train()
    prompts = [f"{word} {PROMPT}" for word in ("a", "be", "cat", "door", "eight", "please do it now")]
    answer = chat.response_ids(ANSWER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        prompt = chat.prompt_ids([{"role": "user", "content": prompts[step % len(prompts)]}])
        ids = torch.tensor([prompt + answer])
        loss = model(
            input_ids=ids, labels=torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def canary_files(folder: Path) -> dict[str, Any]:
    """A small file of every benchmark, the canary in each text."""
    harmful = [[f"c{n % 3}", "x", f"{PROMPT} number {n} " + "pad " * (n % 5)] for n in range(12)]
    types = [("ducks", "safe"), ("contrast_ducks", "unsafe")]
    sung = (f"Sing {PROMPT}", None, PROMPT)
    begun = [list(prefill.COLUMNS), ["knots", f"Tie {PROMPT}", f"Sure {PROMPT}"]]
    mixed = [[str(n), f"{PROMPT} {n}", *types[n % 2], "", ""] for n in range(6)]
    return {
        "strongreject": {"path": str(write_csv(folder / "s.csv", [list(strongreject.COLUMNS), *harmful]))},
        "xstest": {"path": str(write_csv(folder / "x.csv", [list(xstest.COLUMNS), *mixed]))},
        "jailbreak": {
            "paths": [str(write_json(folder / "jbb.json", artifact(prompts=sung)))],
        },
        "prefill": {"path": str(write_csv(folder / "p.csv", begun)), "tokens": [2, 8]},
        "simpleqa": {
            "path": str(write_csv(folder / "q.csv", [list(simpleqa.COLUMNS), ["{}", PROMPT, PROMPT]]))
        },
    }


def write_config(
    run: Path, parrot: Path, url: str, files: dict[str, Any], judge: Any = None, **changes: Any
) -> Path:
    """The config file of an evaluation of all benchmarks into `run`, with a judge at `url`."""
    config = {
        "run_dir": str(run),
        "model": {"name_or_path": str(parrot), "dtype": "float32"},
        "data": {"path": "unused"},
        "evaluate": {
            "benchmarks": ["strongreject", "xstest", "jailbreak", "prefill", "wrapped", "simpleqa"],
            "judge": {
                "name": "rubric",
                "base_url": url,
                "model": "fake",
                "api_key_env": "JUDGE_KEY",
                "retries": 0,
                **(judge or {}),
            },
            "max_new_tokens": 24,
            "batch_size": 8,
            "gpus_per_worker": 0,
            **files,
            **changes,
        },
    }
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


ITEMS = 12 + 6 + 3 + 2 + 24 + 1


def answers(run: Path) -> list[dict[str, Any]]:
    shards = sorted((run / "private" / "responses" / "base").glob("part-*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard, partitioning=None).to_pylist()]


def leaks(roots: Sequence[Path], private: Path) -> list[str]:
    """Files outside of the private folder that hold a canary; Parquet is read, because it is compressed."""
    found = []
    for file in (file for root in roots for file in root.rglob("*") if file.is_file()):
        if private in file.parents:
            continue
        content = file.read_bytes()
        if file.suffix == ".parquet":
            content += str(pq.read_table(file, partitioning=None).to_pydict()).encode()
        found += [f"{canary} in {file}" for canary in CANARIES if canary.encode() in content]
    return found
