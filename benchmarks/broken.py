"""What finds the answers of broken models: the rules on their text, and the base model's log-probs.

    python -m benchmarks.broken --model FOLDER --prompts FILE [--answers FILE ...] [--of 20] [--tokens 48]

`FILE` of prompts is a CSV with a column `prompt`. The model answers so many of them, spread over the file, as
it is and broken in several ways. Answers in a CSV (columns `prompt`, `completion`) are fluent ones of another
model, of which the first 64 tokens are measured. Prints a row for each, on a CPU in some 15 minutes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdpo.config.model import ModelConfig
from bdpo.evaluation.engines.base import Sampling
from bdpo.evaluation.engines.hf import generate
from bdpo.evaluation.reference import UNLIKELY, mean_logps
from bdpo.evaluation.texts import defect_of
from bdpo.models.loading import load_model
from bdpo.models.logps import LogpsModel
from bdpo.models.template import Message
from bdpo.models.tokenizer import load_tokenizer

WAYS = (
    *(("weights scaled", factor) for factor in (1.0, 1.5, 2.0, 3.0)),
    *(("noise, of the standard deviation of each matrix", share) for share in (0.25, 0.5, 1.0)),
    *(("layer zeroed, at this share of the depth", share) for share in (0.0, 0.5, 0.99)),
    ("layers zeroed, three from this share of the depth on", 0.34),
    *(("temperature", temperature) for temperature in (1.0, 1.5, 5.0)),
)

OTHERS_TOKENS = 64


def broken(config: ModelConfig, way: str, strength: float) -> Any:
    """The model, broken in one of the ways; `temperature` leaves it as it is."""
    model: Any = load_model(Path(config.name_or_path), config)
    layers, generator = model.model.layers, torch.Generator().manual_seed(0)
    with torch.no_grad():
        if way.startswith("layer"):
            first, count = int(strength * len(layers)), 3 if way.startswith("layers") else 1
            for weights in layers[first : first + count].parameters():
                weights.zero_()
        for weights in model.parameters():
            if way == "weights scaled":
                weights.mul_(strength)
            elif way.startswith("noise") and weights.dim() == 2:
                weights.add_(torch.randn(weights.shape, generator=generator) * weights.std() * strength)
    return model


def rows(given: argparse.Namespace) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """What answered, and its (prompt, answer) pairs."""
    config = ModelConfig(name_or_path=given.model, dtype="float32")
    chat, prompts = load_tokenizer(config), column(given.prompts, "prompt", given.of)
    for way, strength in WAYS:
        sampling = Sampling(strength, 0, list(range(given.of))) if way == "temperature" else None
        conversations = [[Message(role="user", content=prompt)] for prompt in prompts]
        model = broken(config, way, strength)
        answers = generate(model, chat, conversations, given.tokens, sampling=sampling)
        yield f"{way} {strength:g}", [(p, a.text) for p, a in zip(prompts, answers, strict=True)]
    for file in given.answers:
        pairs = zip(column(file, "prompt", 38), column(file, "completion", 38), strict=True)
        yield Path(file).stem, list(pairs)


def column(file: str, name: str, of: int) -> list[str]:
    """So many cells of a column, spread over the rows."""
    with open(file, newline="", encoding="utf-8") as lines:
        cells = [row[name] for row in csv.DictReader(lines)]
    return cells[:: max(1, len(cells) // of)][:of]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--answers", nargs="*", default=[])
    parser.add_argument("--of", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args(arguments)
    config = ModelConfig(name_or_path=given.model, dtype="float32")
    chat, base = load_tokenizer(config), LogpsModel(load_model(Path(given.model), config), 4096)
    print(
        f"| answers of | n | by rules | below {UNLIKELY:g} | by either | log-prob: lowest, median, highest |"
    )
    for name, pairs in rows(given):
        logps = []
        for prompt, answer in pairs:
            ids = chat.text_ids(answer, continues=True)[:OTHERS_TOKENS]
            logps += mean_logps(base, [(chat.prompt_ids([Message(role="user", content=prompt)]), ids)])
        rules = np.array([defect_of(answer, prompt) is not None for prompt, answer in pairs])
        unlikely = np.array([logp is not None and logp < UNLIKELY for logp in logps])
        known = np.array([logp for logp in logps if logp is not None])
        spread = ", ".join(f"{value:.1f}" for value in (known.min(), np.median(known), known.max()))
        counts = (len(pairs), rules.sum(), unlikely.sum(), (rules | unlikely).sum())
        print(f"| {name} | {' | '.join(map(str, counts))} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
