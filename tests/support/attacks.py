"""A small run whose models are attacked, and judges that decide by what a test gives them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bdpo.config import Config, parse_config
from bdpo.evaluation.attacks.results import AttackSummary
from bdpo.evaluation.attacks.tables import attack_table
from bdpo.evaluation.judges.base import Harm, Question, Verdict
from bdpo.evaluation.judges.registry import JudgeNote
from bdpo.models.tokenizer import ChatTokenizer
from pipelines.runtime.pool import InProcess, ShardWork
from tests.support.benchmark_files import write_csv
from tests.support.helpers import save_model

REQUESTS = 5
GOAL = "canary-goal-5f1c"


def attack_config(folder: Path, chat: ChatTokenizer, run: str = "run", **attack: Any) -> Config:
    """The config of an attack on a random model, judged by strings; `attack` is its section."""
    model = folder / "model"
    if not model.exists():
        save_model(model, chat)
        rows = [["category", "source", "forbidden_prompt"]]
        rows += [[f"c{n % 2}", "x", f"{GOAL} {n}"] for n in range(REQUESTS)]
        write_csv(folder / "s.csv", rows)
    values = {
        "run_dir": str(folder / run),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"path": "unused"},
        "evaluate": {"max_new_tokens": 4, "strongreject": {"path": str(folder / "s.csv")}},
        "attack": {"gpus_per_worker": 0, **attack},
    }
    return parse_config(values, "test")


def attacker_section(url: str, **changes: Any) -> dict[str, Any]:
    """The section of a PAIR attack whose attacker is at `url`; `changes` are its keys and the attacker's."""
    attacker = {"base_url": url, "model": "m", "retries": 0, "temperature": 0.7, "max_tokens": 99}
    attacker |= {key: changes.pop(key) for key in ("timeout", "concurrency") if key in changes}
    return {"name": "pair", "attacker": attacker, **changes}


def attacker_reply(prompt: str) -> str:
    """What an attacker that keeps to the format replies."""
    return json.dumps({"improvement": "none", "prompt": prompt})


def printed_attack(found: AttackSummary) -> str:
    """The table of an attack on the base model, as the terminal shows it."""
    console = Console(width=120, file=io.StringIO())
    console.print(attack_table("gcg", {"base": found}, JudgeNote("rubric")))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@dataclass(frozen=True)
class JudgeBy:
    """Harm is 1 where `harmful` is true of the response, else 0."""

    harmful: Callable[[str], bool]
    concurrency: int = 1

    def __call__(self, question: Question, response: str) -> Verdict:
        return Harm(float(self.harmful(response)))


@dataclass
class Interrupted:
    """An executor that makes some shards and is then interrupted, as a command that is killed between two."""

    shards: int

    def complete_shards(self, work: ShardWork) -> None:
        make = work.actor(**work.arguments, device="cpu")
        for first, rows in work.missing():
            if self.shards == 0:
                raise KeyboardInterrupt
            make({"first": first, "rows": rows})
            self.shards -= 1


IN_PROCESS = InProcess()
