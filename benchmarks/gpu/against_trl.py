"""A training step against TRL's DPOTrainer, live and precomputed reference, on the same pairs.

`python -m benchmarks.gpu trl`. Both by their defaults: micro-batches of 16384 tokens here, of 8 pairs there;
64 pairs a step, activation checkpointing, AdamW with float32 states over float32 weights. What differs: ours
computes with bfloat16 weights beside the float32 ones and sums gradients in float32 (18 bytes a parameter);
TRL computes under bfloat16 autocast with the float32 weights, its default on one GPU (16 bytes a parameter),
and its live reference is in float32 too unless the case says otherwise. The loss is B-DPO's here and DPO's
there. TRL at 7B is tried, to know whether it fits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch

from bdpo.models.tokenizer import ChatTokenizer
from benchmarks.common import MAX_LENGTH
from benchmarks.gpu import training
from benchmarks.gpu.record import NotMeasured, Row, not_measured, shown, verdict
from benchmarks.gpu.setup import (
    Clock,
    Setup,
    chat_tokenizer,
    pairs_file,
    profiled,
    random_model,
)

LIVE, PRECOMPUTED = "TRL, live reference", "TRL, precomputed reference"
CASES = (
    *(f"3b {what}" for what in ("scoring", "bdpo", LIVE, PRECOMPUTED)),
    *(f"7b {what}" for what in (LIVE, PRECOMPUTED)),
    f"3b {LIVE}, in bfloat16",
    *(f"1.5b {what}" for what in ("scoring", "bdpo", LIVE, PRECOMPUTED)),
)
TRL_BATCH = 8  # TRL's default per_device_train_batch_size


def wanted(case: str, rows: list[Row]) -> bool:
    """1.5B is for where TRL does not fit at 3B."""
    fits = any("seconds_a_step" in row for row in rows if row["case"] == f"3b {LIVE}")
    return not (case.startswith("1.5b") and fits)


def measure(case: str, setup: Setup) -> Iterator[Row]:
    """The one row of a case."""
    if "TRL" in case:
        yield trl_training(case, setup)
    else:
        yield from training.measure(case, setup)


def trl_training(case: str, setup: Setup) -> Row:
    """`DPOTrainer.train` over the same pairs, its first steps not counted.

    Raises:
        NotMeasured: TRL is not installed.
    """
    try:
        from trl import DPOTrainer
    except ImportError as error:
        raise NotMeasured(f"TRL cannot be imported ({error})") from None
    name, live = case.split(" ", 1)[0], "live" in case
    rows, tokenizer, clock = pair_rows(setup), chat_tokenizer(), Clock(setup.device)
    of_reference = torch.bfloat16 if case.endswith("in bfloat16") else torch.float32
    policy = random_model(setup.shape(name), torch.float32, setup.device)
    reference = random_model(setup.shape(name), of_reference, setup.device) if live else None
    started = time.perf_counter()
    trainer = DPOTrainer(
        policy,
        reference,
        dpo_config(setup, precomputed=not live),
        train_dataset=as_dataset(rows),
        processing_class=tokenizer,
        callbacks=[marks_of_steps(clock)],
    )
    seconds_to_build = time.perf_counter() - started  # with the precomputed reference's pass in it
    trainer.train()
    seconds = clock.seconds()[setup.warm_up - 1 :]
    tokens = sum(map(real_tokens(tokenizer), rows)) / (setup.warm_up + setup.steps)
    row = training.step_row(setup, name, seconds, tokens)
    batch = next(iter(trainer.get_train_dataloader()))
    profiled(setup, case, lambda: trainer.training_step(trainer.model, batch))
    return {"pairs_a_step": setup.pairs_a_step, "seconds_to_build": seconds_to_build, **row}


def dpo_config(setup: Setup, precomputed: bool) -> Any:
    """TRL's arguments where they are not its defaults."""
    from trl import DPOConfig

    pairs = min(TRL_BATCH, setup.pairs_a_step)
    return DPOConfig(
        str(setup.work / "trl"),
        bf16=not setup.smoke,
        use_cpu=setup.smoke,
        gradient_checkpointing=True,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=setup.pairs_a_step // pairs,
        max_steps=setup.warm_up + setup.steps,
        lr_scheduler_type="cosine",
        max_length=MAX_LENGTH,
        precompute_ref_log_probs=precomputed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def marks_of_steps(clock: Clock) -> Any:
    """A callback that marks the end of every optimizer step."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    return Marks()


def pair_rows(setup: Setup) -> list[dict[str, Any]]:
    """The pairs that ours is trained on."""
    file = pairs_file(setup, (setup.warm_up + setup.steps) * setup.pairs_a_step)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """For the trainer."""
    from datasets import Dataset

    return Dataset.from_list(rows)


def real_tokens(tokenizer: Any) -> Any:
    """How many tokens a pair has, its prompt counted once: the same measure for both."""
    chat = ChatTokenizer(tokenizer)

    def count(row: dict[str, Any]) -> int:
        responses = (chat.response_ids(row[side][0]["content"]) for side in ("chosen", "rejected"))
        return len(chat.prompt_ids(row["prompt"])) + sum(map(len, responses))

    return count


def table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    """For people: every training, then ours over TRL's where both have numbers."""
    steps = {row["case"]: row for row in rows if "seconds_a_step" in row}
    lines = [
        "| training | s/step | real tokens/s | MFU, % | peak GiB | ours over it: s/step | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: dict[str, list[float | None]] = {}
    for case, row in steps.items():
        ours = steps.get(case.split(" ", 1)[0] + " bdpo", {})
        ratios[case] = [
            ours[of] / row[of] if ours.get(of) and row[of] else None for of in ("seconds_a_step", "peak_gib")
        ]
        over = " | ".join(shown(ratio, ".2f") for ratio in ratios[case])
        lines.append(
            f"| {case} | {row['seconds_a_step']:.2f} | {row['tokens_per_second']:,.0f} | {shown(row['mfu'])} "
            f"| {shown(row['peak_gib'])} | {over} |"
        )
    name = next((n for n in ("3b", "1.5b") if f"{n} {LIVE}" in steps and f"{n} bdpo" in steps), "3b")
    live, precomputed = (ratios.get(f"{name} {of}", [None, None]) for of in (LIVE, PRECOMPUTED))
    return [
        *lines,
        "",
        "Real tokens and MFU (6N) are the same measure for both: padding, and a prompt's second time, count "
        "for neither. What differs in precision: `benchmarks/gpu/against_trl.py`.",
        "",
        verdict(f"{name}: step time / TRL with live reference", live[0], 0.60),
        verdict(f"{name}: step time / TRL with precomputed reference", precomputed[0], 0.75),
        verdict(f"{name}: peak memory / TRL with live reference", live[1], 0.90),
        *not_measured(rows),
    ]
