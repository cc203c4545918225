"""Preparing preference pairs: rows a second of CPU time on one core, and the peak of memory.

    OMP_NUM_THREADS=1 python -m benchmarks.prepare [--rows 300000] [--model FOLDER] [--data FILE]

Without `--model` a byte-level BPE tokenizer of 8,000 tokens is trained on the invented rows; without `--data`
the rows are invented, with the lengths of HH-RLHF: transcripts of one to four questions. Beside the rate
stand those of tokenisation alone on the same rendered texts, ours and that of the library `tokenizers`
(`encode_batch_fast`), and the time of a plain Python loop, which tells how fast the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bdpo.config import DataConfig, ModelConfig
from bdpo.data.pairs import PairReader
from bdpo.data.prepare import BATCH_ROWS, prepare, usable_pair
from bdpo.data.rendering import render_pair
from bdpo.data.sources import open_source
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer
from bdpo.sandbox.tiny import train_tokenizer
from benchmarks.common import write_section
from pipelines.tiny_model import CHAT_TEMPLATE

LOOP = 10_000_000

LETTERS = "etaoinshrdlucmfwygpb"


def invented_rows(count: int, file: Path) -> None:
    """Transcripts of invented words whose frequencies fall as 1/rank, as those of a language do."""
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    stock = iter(rng.choices(words, weights, k=4_000_000))

    def text(mean: int) -> str:
        nonlocal stock
        length = max(3, round(mean * rng.lognormvariate(-0.18, 0.6)))
        found = list(islice(stock, length))
        if len(found) < length:
            stock = iter(rng.choices(words, weights, k=4_000_000))
            found = list(islice(stock, length))
        return " ".join(found).capitalize() + "."

    with file.open("w") as out:
        for _ in range(count):
            turns = rng.choice((1, 1, 2, 2, 3, 4))
            begin = "".join(f"\n\nHuman: {text(18)}\n\nAssistant: {text(38)}" for _ in range(turns - 1))
            begin += f"\n\nHuman: {text(18)}\n\nAssistant: "
            out.write(json.dumps({"chosen": begin + text(45), "rejected": begin + text(45)}) + "\n")


def tokenizer_of(file: Path) -> ChatTokenizer:
    """A byte-level BPE tokenizer of the first rows."""
    with file.open() as lines:
        texts = [json.loads(line)["chosen"] for line in islice(lines, 2000)]
    tokenizer = train_tokenizer(
        texts,
        8000,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    return ChatTokenizer(tokenizer)


def cpu_of_loop() -> float:
    """CPU seconds of a plain loop: some 0.4 s on a quiet core of 2023."""
    begun, total = time.process_time(), 0
    for number in range(LOOP):
        total += number
    return time.process_time() - begun


def tokenizer_rates(config: DataConfig, chat: ChatTokenizer) -> tuple[float, float]:
    """Rows a second of CPU time in which the texts of some rows are tokenised, by us and by `tokenizers`.

    Both go through them once: a second time they would find their words in a cache.
    """
    source = open_source(config.sources()[0])
    pairs = [usable_pair(source.format, row, source.config) for _, row in islice(source.rows, 3000)]
    texts = [[one.prompt, one.chosen, one.rejected] for one in (render_pair(chat, pair) for pair in pairs)]
    batches = [
        [*chain.from_iterable(texts[first : first + BATCH_ROWS])]
        for first in range(0, len(texts), BATCH_ROWS)
    ]
    library: Any = chat.tokenizer
    encode = partial(library.backend_tokenizer.encode_batch_fast, add_special_tokens=False)
    ours, theirs = (cpu_of(tokenise, batches) for tokenise in (chat.ids_of_texts, encode))
    return len(pairs) / ours, len(pairs) / theirs


def cpu_of(tokenise: Callable[[list[str]], Any], batches: list[list[str]]) -> float:
    """CPU seconds of a function on all batches."""
    begun = time.process_time()
    for batch in batches:
        tokenise(batch)
    return time.process_time() - begun


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--data", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = arguments.data or folder / "rows.jsonl"
        if not arguments.data:
            invented_rows(arguments.rows, file)
        chat = (
            load_tokenizer(ModelConfig(name_or_path=arguments.model))
            if arguments.model
            else tokenizer_of(file)
        )
        config = DataConfig(path=str(file), limit=arguments.rows, max_bad_fraction=1.0)
        ours, library = tokenizer_rates(config, chat)
        loop = cpu_of_loop()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.process_time()
        account = prepare(config, chat, folder / "pairs", folder / "private", seed=0)
        seconds = time.process_time() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ids = PairReader(folder / "pairs").read(0, 2000, ["prompt_ids", "chosen_ids", "rejected_ids"])
        tokens = sum(len(row) for name in ids.column_names for row in ids[name].to_pylist()) / ids.num_rows
    rate = account.rows / seconds
    columns = {
        "rows": f"{account.rows:,}",
        "kept": f"{account.kept:,}",
        "tokens a row": f"{tokens:.0f}",
        "rows a CPU second": f"{rate:,.0f}",
        "tokens a CPU second": f"{rate * tokens / 1e6:.2f} M",
        "tokenisation alone": f"{ours:,.0f}",
        "tokenisation by `tokenizers`": f"{library:,.0f}",
        "a loop of 10 M additions": f"{loop:.2f} s",
        "memory before": f"{before / 2**20:.2f} GiB",
        "peak": f"{peak / 2**20:.2f} GiB",
    }
    table = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), columns.values())]
    write_section("Preparing pairs, one core", table)
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
