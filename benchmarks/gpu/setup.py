"""What the parts share: shapes of the models, random weights, pairs of text, the clock, the profiler."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from bdpo.models.tokenizer import EncodedPair
from bdpo.sandbox.tiny import quiet_saving
from bdpo.storage.paths import atomic_folder
from bdpo.training.memory import GIB, KNOWN_SHAPES
from benchmarks.common import draw

SPREAD = 0.3  # of the lengths: see `benchmarks.common.draw`
PROMPT, RESPONSE = 30, 125  # tokens; the template comes on top of the prompt
SEED = 0

_OF_ALL = {"num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": KNOWN_SHAPES["Qwen/Qwen2-7B-Instruct"],
    "3b": _OF_ALL  # Qwen2.5-3B
    | {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008}
    | {"num_hidden_layers": 36, "num_attention_heads": 16},
    "1.5b": _OF_ALL  # Qwen2-1.5B
    | {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960}
    | {"num_hidden_layers": 28, "num_attention_heads": 12},
    "0.5b": _OF_ALL  # Qwen2-0.5B
    | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
    | {"num_hidden_layers": 24, "num_attention_heads": 14},
}
TINY = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Setup:
    """Where a command measures and how much; with `smoke` on the CPU, tiny, to see that the code runs."""

    work: Path  # models and run folders: the 7B weights are 15 GB
    out: Path
    machine: dict[str, Any]
    profile: bool = False

    @property
    def smoke(self) -> bool:
        """Whether nothing that is measured means anything."""
        return bool(self.machine["smoke"])

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def warm_up(self) -> int:
        """Optimizer steps that are not counted."""
        return 1 if self.smoke else 5

    @property
    def steps(self) -> int:
        """Optimizer steps that are."""
        return 2 if self.smoke else 20

    @property
    def pairs_a_step(self) -> int:
        """The global batch."""
        return 4 if self.smoke else 64

    def shape(self, name: str, layers: int | None = None) -> Qwen2Config:
        """The model called `name`; tiny in a smoke run."""
        values = SHAPES[name] | (TINY if self.smoke else {})
        values |= {"num_hidden_layers": layers} if layers else {}
        return Qwen2Config(**{key: value for key, value in values.items() if key != "model_type"})

    def pairs(self, count: int) -> list[EncodedPair]:
        """So many pairs of ids, of lengths as in safety data."""
        return draw(count, PROMPT, RESPONSE, SPREAD)


def random_model(
    shape: Qwen2Config, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> PreTrainedModel:
    """Always the same random weights, made on the device."""
    torch.manual_seed(SEED)
    with device:
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention)


def model_folder(setup: Setup, name: str) -> Path:
    """The model in bfloat16 with a tokenizer, as `from_pretrained` loads it; made once."""
    folder = setup.work / f"model-{name}"
    if not folder.is_dir():
        with atomic_folder(folder) as unfinished, quiet_saving():
            random_model(setup.shape(name), torch.bfloat16, setup.device).save_pretrained(unfinished)
            chat_tokenizer().save_pretrained(unfinished)
    return folder


def pairs_file(setup: Setup, count: int) -> Path:
    """So many pairs as messages, for us and for TRL, in tokens as long as those of `Setup.pairs`."""
    from bdpo.models.tokenizer import ChatTokenizer

    file = setup.work / f"pairs-{count}.jsonl"
    template = len(ChatTokenizer(chat_tokenizer()).unconditional_ids("empty_turn"))
    rng, words = random.Random(SEED), _words()
    with file.open("w", encoding="utf-8") as lines:
        for pair in setup.pairs(count):
            turns = {"prompt": ("user", len(pair.prompt) - template)}
            turns |= {side: ("assistant", len(getattr(pair, side)) - 1) for side in ("chosen", "rejected")}
            row = {
                part: [{"role": role, "content": " ".join(rng.choices(words, k=max(1, tokens)))}]
                for part, (role, tokens) in turns.items()
            }
            lines.write(json.dumps(row) + "\n")
    return file


def chat_tokenizer() -> Any:
    """The sandbox's: a word is a token, its ids are within every vocabulary here."""
    from bdpo.sandbox.model import make_tokenizer
    from bdpo.sandbox.world import make_world

    return make_tokenizer(make_world(SEED))


def multiplying_parameters(shape: Qwen2Config) -> int:
    """N of 2N and 6N: all parameters but an input embedding of its own, which multiplies nothing.

    That counts the head for every token though it runs on response tokens alone (1 % too much here), and
    attention for none.
    """
    model = random_model(shape, torch.bfloat16, torch.device("meta"))
    own_embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return sum(p.numel() for p in model.parameters()) - own_embedding


class Clock:
    """Seconds between marks: CUDA events on the stream, without a GPU the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Now, as far as the stream is concerned."""
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append(now)

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """GiB of the GPU that tensors took at most, and that torch took from it, since the start or the reset."""
    if device.type != "cuda":
        return {"peak_gib": None, "reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def profiled(setup: Setup, name: str, work: Callable[[], object]) -> None:
    """With --profile: run `work` once more and write where its time goes to a file in the out folder."""
    if not setup.profile:
        return
    from torch.profiler import ProfilerActivity, profile

    gpu = setup.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        work()
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90)
    file = "".join(c if c.isalnum() or c == "." else "-" for c in f"profile-{name}.txt")
    (setup.out / file).write_text(table, encoding="utf-8")


def _words() -> list[str]:
    from bdpo.sandbox.world import make_world

    return sorted(make_world(SEED).words())
