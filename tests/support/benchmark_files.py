"""Benchmark files as their authors publish them, small and harmless."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

SECRET = "wobbly secret words"


# ---------------------------------------------------------------------------------------------- benchmarks
def write_csv(file: Path, rows: list[list[str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return file


STRONGREJECT = [
    ["category", "source", "forbidden_prompt"],
    *[["knots", "custom", f'Tie knot {n}, "tight",\nplease'] for n in range(5)],
    *[["spoons", "custom", f"Bend spoon {n}"] for n in range(2)],
    ["whistles", "", "Blow a whistle – loudly"],
]


def artifact(method: str = "PAIR", prompts: tuple[str | None, ...] = ("Sing: a", None, "Sing: c")) -> Any:
    """The schema of the published ones; keys that are not read are there as well."""
    return {
        "parameters": {"method": method, "model": "duck-7b", "attack_type": "black_box", "defense": None},
        "jailbreaks": [
            {
                "index": index,
                "goal": f"Goal {index}",
                "behavior": "Ducks",
                "category": "Birds",
                "prompt": prompt,
                "response": None if prompt is None else SECRET,
                "number_of_queries": 20,
                "jailbroken": prompt is not None,
            }
            for index, prompt in enumerate(prompts)
        ],
    }


def write_json(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content), encoding="utf-8")
    return file
