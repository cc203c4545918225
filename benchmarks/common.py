"""What the measurements share: workloads, a model, meters, RESULTS.md."""

from __future__ import annotations

import json
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2Config, Qwen2ForCausalLM

from bdpo.models.tokenizer import EncodedPair

VOCABULARY = 720
EMPTY_TURN = 20  # tokens of Qwen2's template around an empty user turn
MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512
TOKENS_PER_BATCH = 4096  # ours: about as many tokens as TRL's batch has
RESULTS = Path(__file__).parent / "RESULTS.md"


def data_sets(pairs: int) -> dict[str, list[EncodedPair]]:
    """Prompts of about 50 tokens with their template, responses of about 125, spread more or less."""
    return {f"safety-like, spread {spread}": draw(pairs, 30, 125, spread) for spread in (0.0, 0.3, 0.6)}


def draw(pairs: int, prompt: int, response: int, spread: float) -> list[EncodedPair]:
    """Log-normal lengths of these means; `spread` is the standard deviation of their logarithm."""
    rng = random.Random(0)

    def tokens(mean: int) -> int:
        return max(1, round(mean * rng.lognormvariate(-(spread**2) / 2, spread)))

    lengths = [(tokens(prompt) + EMPTY_TURN, tokens(response), tokens(response)) for _ in range(pairs)]
    return [_pair(rng, *of_pair) for of_pair in lengths]


def from_file(file: Path, pairs: int) -> tuple[list[EncodedPair], str]:
    """The lengths of the first pairs of a `sharegpt` ranking file, four characters a token.

    Prompts that are too long are left out, as in scoring. The second value describes the selection.
    """
    rows = json.loads(file.read_text(encoding="utf-8"))
    found = []
    for row in rows:
        texts = ["".join(turn["value"] for turn in row["conversations"])]
        texts += [row[side]["value"] for side in ("chosen", "rejected")]
        prompt, *responses = (max(1, len(text) // 4) for text in texts)
        if prompt + EMPTY_TURN <= MAX_PROMPT_LENGTH:
            found.append((prompt + EMPTY_TURN, *responses))
    taken = found[:pairs]
    note = (
        f"{file.name}: the first {len(taken)} of {len(found)} pairs, to keep it short; "
        f"{len(rows) - len(found)} more of its {len(rows)} have prompts of over {MAX_PROMPT_LENGTH} tokens, "
        "which scoring would refuse too."
    )
    return [_pair(random.Random(i), *lengths) for i, lengths in enumerate(taken)], note


def make_model(vocabulary: int = VOCABULARY) -> Qwen2ForCausalLM:
    """A Qwen2 with the proportions of the 7B one: same layer shape, 7 % of its operations in the head."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1356,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )


def flops(model: Any, work: Callable[[], Any]) -> tuple[int, int]:
    """Operations of matrix products and attention, and tokens of the grids that the model was given."""
    tokens = 0

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        ids = kwargs.get("input_ids")
        tokens += (kwargs["inputs_embeds"][..., 0] if ids is None else ids).numel()

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unknown to torch's counter
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    handle.remove()
    return counter.get_total_flops(), tokens


def cpu_seconds(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU time of each, one thread, in turns, best of three."""
    torch.set_num_threads(1)
    best = dict.fromkeys(works, float("inf"))
    for _ in range(3):
        for name, work in works.items():
            started = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - started)
    return best


def apart(measure: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def peak_memory() -> float:
    """The most memory that this process had, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def write_section(title: str, table: list[str], head: str | None = None) -> None:
    """Put a section in RESULTS.md in the place of the one of the same title.

    `head` describes how, when and with which versions it was measured; by default this command, now.
    """
    if head is None:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
        command = " ".join(
            [f"python -m benchmarks.{Path(sys.argv[0]).stem}", *(Path(a).name for a in sys.argv[1:])]
        )
        head = f"`{command}` on {date.today()}: Python {platform.python_version()}, {versions}"
    text = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    sections = [s for s in text.split("\n## ") if not s.startswith(title + "\n")]
    sections.append("\n".join([title, "", head, "", *table, ""]))
    RESULTS.write_text("\n## ".join([sections[0], *sorted(sections[1:])]))


def _pair(rng: random.Random, prompt: int, chosen: int, rejected: int) -> EncodedPair:
    prompt = min(prompt, MAX_PROMPT_LENGTH)
    room = MAX_LENGTH - prompt
    counts = (prompt, min(chosen, room), min(rejected, room))
    return EncodedPair(*([rng.randrange(2, VOCABULARY) for _ in range(count)] for count in counts))
