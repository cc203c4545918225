"""How evenly the pairs of an optimizer step are dealt to the workers: the busiest worker against the mean.

    python -m benchmarks.dealing [--lengths FILE]

`--lengths` adds a data set of your own: a JSON list of [prompt, chosen, rejected] in tokens. No model is run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np

from bdpo.config import TrainConfig
from bdpo.models.arrangement import length_sorted_batches
from bdpo.models.row_layout import RowLayout
from bdpo.training.batches import deal_micro_batches
from benchmarks.common import EMPTY_TURN, MAX_LENGTH, MAX_PROMPT_LENGTH, write_section

HIDDEN_SIZE = 3584  # of Qwen2-7B
STEPS = 40
BUDGET = TrainConfig().tokens_per_micro_batch

Lengths = tuple[int, int, int]


def main() -> None:
    """Deal the steps of every data set and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=Path)
    arguments = parser.parse_args()
    count = STEPS * 256
    sets = {
        # Mean and deviation of the logarithms of Anthropic's harmless-base test set, SmolLM2's tokenizer.
        "HH-like": _log_normal(count, (4.38, 3.33, 3.53), (0.98, 0.87, 0.91)),
        "PKU-like": [
            (prompt + EMPTY_TURN, *responses)
            for prompt, *responses in _log_normal(count, (3.22, 4.65, 4.65), (0.6, 0.6, 0.6))
        ],
    }
    if arguments.lengths:
        found = [tuple(pair) for pair in json.loads(arguments.lengths.read_text())]
        sets[arguments.lengths.name] = Random(0).choices(found, k=count)
    rows = [
        "| data set | workers | batch | tokens, halved by count | tokens | worst step | packed cost "
        "| worst step | longest pair / mean worker | micro-steps | ms a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            _row(name, pairs, workers, batch)
            for name, pairs in sets.items()
            for workers in (8, 16)
            for batch in (64, 256)
        ),
        "",
        f"Busiest worker / mean, over {STEPS} steps, shared rows of a model of width {HIDDEN_SIZE}, "
        f"micro-batches of up to {BUDGET} tokens. Packed cost: operations of the grids that the model is "
        "given, padding and attention included. Halved by count: pairs sorted by length, the largest batch "
        "cut in two until every worker has one. No dealing is below longest pair / mean worker, which "
        "passes 1 in a worst step. ms a step are processor time.",
    ]
    print(*rows, sep="\n")
    write_section("Dealing pairs to workers", rows)


def _log_normal(count: int, means: Sequence[float], deviations: Sequence[float]) -> list[Lengths]:
    """Log-normal lengths, cut as `prepare` cuts them."""
    rng = Random(0)
    pairs = []
    for _ in range(count):
        drawn = [max(1, round(rng.lognormvariate(m, d))) for m, d in zip(means, deviations, strict=True)]
        prompt = min(drawn[0], MAX_PROMPT_LENGTH)
        pairs.append((prompt, min(drawn[1], MAX_LENGTH - prompt), min(drawn[2], MAX_LENGTH - prompt)))
    return pairs


def _row(name: str, pairs: Sequence[Lengths], workers: int, batch: int) -> str:
    layout = RowLayout(HIDDEN_SIZE, shared=True)
    lengths = layout.tokens(np.array(pairs)).tolist()
    halved, tokens, costs, longest, steps, seconds = ([] for _ in range(6))
    for step in range(STEPS):
        here = lengths[step * batch : (step + 1) * batch]
        started = time.process_time()
        dealt = deal_micro_batches(here, here, BUDGET, workers, layout)
        seconds.append(time.process_time() - started)
        steps.append(len(dealt[0]))
        tokens.append(_busiest(sum(map(sum, worker)) for worker in dealt))
        costs.append(_busiest(sum(map(layout.cost, worker)) for worker in dealt))
        halved.append(_busiest(sum(map(sum, worker)) for worker in _halved_by_count(here, workers)))
        longest.append(max(here) / (sum(here) / workers))
    return (
        f"| {name} | {workers} | {batch} | {_mean(halved):.2f} | **{_mean(tokens):.3f}** | {max(tokens):.3f} "
        f"| **{_mean(costs):.3f}** | {max(costs):.3f} | {_mean(longest):.2f} | {_mean(steps):.1f} "
        f"| {1000 * _mean(seconds):.1f} |"
    )


def _halved_by_count(lengths: Sequence[int], workers: int) -> list[list[list[int]]]:
    """[worker][micro-step] -> lengths, as pairs were dealt before."""
    batches = [[lengths[i] for i in batch] for batch in length_sorted_batches(lengths, BUDGET)]
    while len(batches) % workers:
        largest = max(batches, key=len)
        batches.remove(largest)
        batches += [largest[::2], largest[1::2]]
    batches.sort(key=sum, reverse=True)
    return [batches[worker::workers] for worker in range(workers)]


def _busiest(loads: Iterator[float]) -> float:
    found = list(loads)
    return max(found) / _mean(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
