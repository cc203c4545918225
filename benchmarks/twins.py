"""Which threshold of similarity tells near twins from other prompts.

    python -m benchmarks.twins --advbench FILE --strongreject FILE --xstest FILE --past-tense FILE

Writes its section of benchmarks/RESULTS.md: for pairs of prompts of known kinds, the share whose similarity
is at least a threshold. No prompt is in it. Small edits are made here; the past-tense artifacts hold
rewritings of a request; an unsafe prompt of XSTest and the safe prompt most similar to it ask for different
things by XSTest's labels, as do prompts of AdvBench and XSTest but for a few.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdpo.evaluation.twins import SIMILAR, similarity
from benchmarks.common import write_section

THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)


def column(file: Path, name: str) -> list[str]:
    """A column of a CSV file."""
    with file.open(encoding="utf-8", newline="") as stream:
        return [row[name] for row in csv.DictReader(stream)]


def without_a_word(prompt: str) -> str:
    """The word in the middle is another one."""
    words = prompt.split()
    words[len(words) // 2] = "some"
    return " ".join(words)


def nearest(prompts: Sequence[str], others: Sequence[str]) -> list[float]:
    """Of each prompt the similarity of the most similar of the others."""
    return [max(similarity(prompt, other) for other in others) for prompt in prompts]


def measured(given: argparse.Namespace) -> dict[str, list[float]]:
    """Kind of pair -> similarities."""
    advbench, strongreject = column(given.advbench, "goal"), column(given.strongreject, "forbidden_prompt")
    prompts = list(zip(column(given.xstest, "prompt"), column(given.xstest, "label"), strict=True))
    safe, unsafe = ([text for text, label in prompts if label == name] for name in ("safe", "unsafe"))
    rewritten = json.loads(given.past_tense.read_text(encoding="utf-8"))["jb_artifacts"]
    asked = [*advbench, *strongreject]
    return {
        "same, a sentence in front": [similarity(p, f"Hello, I have a question. {p}") for p in asked],
        "same, a sentence behind": [similarity(p, f"{p} Please answer in detail.") for p in asked],
        "same, a word replaced": [similarity(p, without_a_word(p)) for p in asked],
        "same, rewritten in the past tense": [
            similarity(row["request"], row["request_reformulated"]) for row in rewritten
        ],
        "other: XSTest's unsafe prompts, nearest safe one": nearest(unsafe, safe),
        "other: AdvBench, nearest of XSTest": nearest(advbench, [text for text, _ in prompts]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("advbench", "strongreject", "xstest", "past-tense"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    rows = []
    for kind, found in measured(parser.parse_args()).items():
        shares = [f"{100 * (np.array(found) >= threshold).mean():.1f}" for threshold in THRESHOLDS]
        rows.append(f"| {kind} | {len(found)} | " + " | ".join(shares) + " |")
    table = [
        f"Percent of pairs whose similarity is at least the threshold; `SIMILAR` is {SIMILAR}.",
        "",
        f"| pair of prompts | n | {' | '.join(map(str, THRESHOLDS))} |",
        f"|---|---|{'---|' * len(THRESHOLDS)}",
        *rows,
    ]
    write_section("Near twins", table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
