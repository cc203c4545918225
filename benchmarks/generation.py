"""Generation throughput on a CPU: one prompt at a time, in batches, in batches sorted by length.

    python -m benchmarks.generation

Writes its section of benchmarks/RESULTS.md. The model is a Qwen2 with random weights, so that every answer
has its full length; prompts are random words of the sandbox with the spread of lengths that chat prompts
have. Processor time of one thread, the three ways in turn, best of three rounds. All ways must give the
same answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bdpo.config import ModelConfig
from bdpo.evaluation.engines.hf import generate
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer
from bdpo.sandbox.world import make_world
from benchmarks.common import write_section

PROMPTS, NEW_TOKENS, BATCH, ROUNDS = 192, 48, 32, 3
Prompts = list[list[Message]]


def random_model(vocabulary: int) -> PreTrainedModel:
    """About 5 million weights: large enough that a step is more than Python's overhead."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def random_prompts() -> Prompts:
    """Lengths are log-normal: a median of 27 words, a tenth of them longer than 75, at most 300."""
    rng, words = Random(0), make_world(0).words()
    lengths = [min(300, max(3, round(rng.lognormvariate(3.3, 0.8)))) for _ in range(PROMPTS)]
    return [[Message(role="user", content=" ".join(rng.choices(words, k=n)))] for n in lengths]


def in_batches(model: PreTrainedModel, chat: ChatTokenizer, prompts: Prompts, size: int) -> list[str]:
    batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    return [answer.text for batch in batches for answer in generate(model, chat, batch, NEW_TOKENS)]


def sorted_batches(model: PreTrainedModel, chat: ChatTokenizer, prompts: Prompts, size: int) -> list[str]:
    """As the evaluation plans its shards: the longest prompts first, by characters."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i][0]["content"]))
    texts = in_batches(model, chat, [prompts[i] for i in order], size)
    return [text for _, text in sorted(zip(order, texts, strict=True))]


def padding(chat: ChatTokenizer, prompts: Prompts) -> float:
    """Padded over real prompt tokens, in batches of `BATCH`."""
    lengths = [len(chat.prompt_ids(prompt)) for prompt in prompts]
    batches = [lengths[first : first + BATCH] for first in range(0, len(lengths), BATCH)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(lengths)


def measure(ways: dict[str, Callable[[], list[str]]]) -> dict[str, float]:
    """Seconds of processor time of each way, the best of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = set()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            answers.add(tuple(way()))
            seconds[name].append(time.process_time() - started)
    assert len(answers) == 1, "the ways give different answers"
    return {name: min(spent) for name, spent in seconds.items()}


def section(seconds: dict[str, float], pads: dict[str, float]) -> list[str]:
    single = next(iter(seconds.values()))
    rows = []
    for name, spent in seconds.items():
        speed = PROMPTS * NEW_TOKENS / spent
        rows.append(f"| {name} | {spent:.2f} | {speed:.0f} | {pads[name]:.2f} | {single / spent:.1f} × |")
    return [
        f"{PROMPTS} prompts, {NEW_TOKENS} new tokens each, batches of {BATCH}, a random Qwen2 of 5 M weights "
        f"in float32. Processor time of one thread, best of {ROUNDS} rounds in turn. All three ways give the "
        "same answers.",
        "",
        "| way | seconds | new tokens per second | padded / real prompt tokens | against one by one |",
        "|---|---|---|---|---|",
        *rows,
    ]


def main() -> None:
    torch.set_num_threads(1)
    chat = load_tokenizer(ModelConfig(name_or_path="sandbox"))
    model, prompts = random_model(len(chat.tokenizer)), random_prompts()
    by_length = sorted(prompts, key=lambda prompt: -len(prompt[0]["content"]))
    seconds = measure(
        {
            "one by one": lambda: in_batches(model, chat, prompts, 1),
            "batched": lambda: in_batches(model, chat, prompts, BATCH),
            "batched, sorted by length": lambda: sorted_batches(model, chat, prompts, BATCH),
        }
    )
    pads = {
        "one by one": 1.0,
        "batched": padding(chat, prompts),
        "batched, sorted by length": padding(chat, by_length),
    }
    table = section(seconds, pads)
    write_section("Generation", table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
