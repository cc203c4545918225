"""The reference pass: ours against TRL's, both with the unconditional terms.

    python -m benchmarks.scoring [--pairs 48] [--data FILE]

`--data` adds a second data set, the lengths of a preference file in LLaMA-Factory's ranking format.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bdpo.models.arrangement import length_sorted_batches
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout
from bdpo.models.tokenizer import EncodedPair
from bdpo.scoring.reference import reference_logps
from benchmarks.common import (
    EMPTY_TURN,
    MAX_LENGTH,
    TOKENS_PER_BATCH,
    cpu_seconds,
    data_sets,
    flops,
    from_file,
    make_model,
    write_section,
)
from benchmarks.peer import trl_batches, trl_trainer

EMPTY = list(range(2, 2 + EMPTY_TURN))
# TRL: 2 · (50 + 125) + 2 · (20 + 125) tokens a pair; ours: 50 + 2 · 125 + 2 · 125, were c(∅) for nothing.
FLOOR = (
    "At spread 0.0 no ratio of 0.75 is possible: all lengths are equal, TRL pads nothing, and all there is "
    "to save are contexts. Each prompt once and c(∅) never, counted in tokens, would be "
    f"{(50 + 4 * 125) / (2 * (50 + 125) + 2 * (EMPTY_TURN + 125)):.2f}."
)


def main() -> None:
    """Measure both on every data set and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    sets, notes = data_sets(arguments.pairs), []
    if arguments.data:
        sets[arguments.data.name], note = from_file(arguments.data, arguments.pairs)
        notes = ["", note]
    rows = [
        "| data set | GFLOP ours / TRL | ratio | CPU s ours / TRL | ratio "
        "| padded/real TRL | ours | ours, 7B |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, pairs) for name, pairs in sets.items()),
        "",
        "padded/real counts a context that ours repeats as padding; 7B: rows as planned for that width.",
        "",
        FLOOR,
        *notes,
        "",
        "| data set | bfloat16 − float32, nats/token: mean, mean size, max | of MI | mean size of MI |",
        "|---|---|---|---|",
        *(_drift(name, pairs) for name, pairs in sets.items()),
    ]
    print(*rows, sep="\n")
    write_section("Scoring: all four terms", rows)


def _row(name: str, pairs: list[EncodedPair]) -> str:
    (model, work), (trl_model, trl_work) = ours(pairs), trl(pairs)
    operations, tokens = flops(model, work)
    trl_operations, trl_tokens = flops(trl_model, trl_work)
    seconds = cpu_seconds({"ours": work, "TRL": trl_work})
    responses = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    real = sum(len(pair.prompt) for pair in pairs) + 2 * responses + EMPTY_TURN
    trl_real = 2 * sum(len(pair.prompt) + EMPTY_TURN for pair in pairs) + 2 * responses
    return (
        f"| {name}, {len(pairs)} pairs | {operations / 1e9:.0f} / {trl_operations / 1e9:.0f} "
        f"| **{operations / trl_operations:.3f}** "
        f"| {seconds['ours']:.1f} / {seconds['TRL']:.1f} | {seconds['ours'] / seconds['TRL']:.2f} "
        f"| {trl_tokens / trl_real:.3f} | {tokens / real:.3f} | {_tokens_as_7b(pairs) / real:.3f} |"
    )


def _drift(name: str, pairs: list[EncodedPair]) -> str:
    """How far bfloat16 is from float32 with the same weights, that is with those of the bfloat16 model."""
    rounded = make_model().bfloat16()
    models = [
        LogpsModel(copy.deepcopy(rounded).to(dtype), MAX_LENGTH).eval() for dtype in (None, torch.float32)
    ]
    low, exact = (
        reference_logps(model, PrefixGroups.of(pairs), EMPTY, TOKENS_PER_BATCH)[0] for model in models
    )
    tokens = {
        side: torch.tensor([len(getattr(pair, side)) for pair in pairs]) for side in ("chosen", "rejected")
    }

    def per_token(logps: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        return torch.cat([logps[f"{kind}_{side}_logps"] / tokens[side] for side in tokens])

    terms = [per_token(low, kind) - per_token(exact, kind) for kind in ("ref", "uncond")]
    mi = per_token(exact, "ref") - per_token(exact, "uncond")
    cells = [
        f"{drift.mean():.1e}, {drift.abs().mean():.1e}, {drift.abs().max():.1e}"
        for drift in (torch.cat(terms), terms[0] - terms[1])
    ]
    return f"| {name} | {cells[0]} | {cells[1]} | {mi.abs().mean():.1e} |"


def _tokens_as_7b(pairs: list[EncodedPair]) -> int:
    """Of all grids that our scorer would lay out for a model as wide as Qwen2-7B."""
    tokens, layout, of_pairs = 0, RowLayout(3584, shared=True), PrefixGroups.of(pairs)
    for groups in (of_pairs, of_pairs.behind(EMPTY)):
        batches = length_sorted_batches(layout.tokens(groups.lengths).tolist(), TOKENS_PER_BATCH)
        tokens += sum(layout.pack(groups[batch]).input_ids.numel() for batch in batches)
    return tokens


def ours(pairs: list[EncodedPair]) -> tuple[Any, Callable[[], Any]]:
    """The scorer's own function."""
    model = LogpsModel(make_model(), MAX_LENGTH).eval()
    return model.model, partial(reference_logps, model, PrefixGroups.of(pairs), EMPTY, TOKENS_PER_BATCH)


def trl(pairs: list[EncodedPair]) -> tuple[Any, Callable[[], Any]]:
    """TRL's `compute_ref_log_probs` over the pairs, and once more with the empty turn for a prompt."""
    trainer = trl_trainer(make_model())
    unconditional = [EncodedPair(EMPTY, pair.chosen, pair.rejected) for pair in pairs]

    @torch.inference_mode()
    def work() -> None:
        for batch in (*trl_batches(pairs), *trl_batches(unconditional)):
            trainer.compute_ref_log_probs(trainer.model.eval(), batch)

    return trainer.model, work


if __name__ == "__main__":
    main()
