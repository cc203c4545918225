"""How long a training stands still for a checkpoint, beside one that it would write and hash itself.

    OMP_NUM_THREADS=1 python -m benchmarks.saving

One worker with AdamW and ZeRO 3 on a small Qwen2 of random weights, whose state is that worker's part of
the checkpoint. What training waits for is the copy to host memory; the file is written and hashed by a
thread. The other way is DeepSpeed's `save_checkpoint` and the hash of its files. Wall-clock time, in turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bdpo.config import Config, parse_config
from bdpo.storage.digests import sha256
from bdpo.storage.run_dir import RunDir
from bdpo.training.checkpoints import TrainProgress
from bdpo.training.engine import build_engine
from bdpo.training.launcher import Launcher
from bdpo.training.resharding import STATE
from bdpo.training.saving import CheckpointSaver
from benchmarks.common import write_section

ROUNDS = 5


def main() -> None:
    """Measure both and write the section."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # which transformers reads under ZeRO 3
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        seconds, size = measure(Path(folder))
    gigabytes = size / 1e9
    rows = ["| training waits for | s | s a GB |", "|---|---|---|"]
    rows += [f"| {what} | {took:.2f} | **{took / gigabytes:.3f}** |" for what, took in seconds.items()]
    rows += ["", f"A part of {gigabytes:.2f} GB, on a local disk; the median of {ROUNDS} in turns."]
    print(*rows, sep="\n")
    write_section("Checkpoints: how long a training stands still", rows)
    torch.distributed.destroy_process_group()


def measure(folder: Path) -> tuple[dict[str, float], int]:
    """Seconds of each way, and the bytes of the checkpoint."""
    engine = trained_engine(folder)
    took: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        took.setdefault(what, []).append(time.perf_counter() - begun)

    def drop(part: Path, _: dict[str, float]) -> None:
        shutil.rmtree(part)

    config = config_of(folder)
    with CheckpointSaver(engine, RunDir(config.run_dir), config.train, Launcher(list, drop)) as saver:
        timed("the first copy, whose memory is new", lambda: saver.save(TrainProgress(), {}, {}))
        for _ in range(ROUNDS):
            saver.finish()
            timed("a copy", lambda: saver.save(TrainProgress(), {}, {}))
            saver.finish()
            timed("writing and hashing", lambda: write_and_hash(engine, folder / "direct"))
            size = sum(file.stat().st_size for file in (folder / "direct").rglob("*") if file.is_file())
            shutil.rmtree(folder / "direct")
    return {what: statistics.median(seconds) for what, seconds in took.items()}, size


def trained_engine(folder: Path) -> Any:
    """An engine that has made a step, so that the optimizer has its moments."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=16_000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(shape).bfloat16().save_pretrained(folder / "model")
    engine = build_engine(config_of(folder), total_steps=10, warmup_steps=1)
    tokens = torch.arange(16)[None]
    engine.backward(engine.module.model(input_ids=tokens, labels=tokens).loss)
    engine.step()
    return engine


def config_of(folder: Path) -> Config:
    """A training of one worker."""
    model = {"name_or_path": str(folder / "model"), "dtype": "bfloat16"}
    train = {"workers": 1, "gpus_per_worker": 0, "zero_stage": 3, "gradient_checkpointing": False}
    values = {"run_dir": str(folder / "run"), "model": model, "data": {"path": "none"}, "train": train}
    return parse_config(values, "benchmark")


def write_and_hash(engine: Any, folder: Path) -> None:
    """What a training would do that writes its checkpoint itself."""
    engine.save_checkpoint(str(folder), tag=STATE)
    for file in folder.rglob("*"):
        if file.is_file():
            sha256(file)


if __name__ == "__main__":
    main()
