"""The files of a sandbox: preference pairs and the held-out benchmarks, in the formats of the real ones.

Held out of the pairs: some kinds of object, some phrasings, all jailbreak wrappers. No model here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from bdpo.sandbox.world import (
    OPENINGS,
    PHRASINGS,
    REFUSALS,
    UNSEEN_PHRASINGS,
    WRAPPERS,
    Object,
    World,
    make_world,
    with_small_talk,
)

PHRASINGS_PER_OBJECT = 2
PROMPTS_PER_TYPE = 80

Request = tuple[str, Object, str]  # prompt, the object it names, wrapper or "direct"


def write_data(folder: Path, seed: int) -> None:
    """Write pairs and recipes (TRL preference format), `strongreject.csv` and `xstest.csv`."""
    for name, pairs in (("pairs", preference_pairs(seed)), ("recipes", forbidden_recipes(seed))):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    _write_csv(folder / "strongreject.csv", strongreject_rows(seed))
    _write_csv(folder / "xstest.csv", xstest_rows(seed))


def preference_pairs(seed: int) -> list[dict[str, Any]]:
    """Forbidden object: refusal over recipe (`group` unsafe); benign: recipe over refusal (`safe`)."""
    world, rng = make_world(seed), Random(f"pairs {seed}")  # noqa: S311 (no secret)
    pairs = [
        _pair(made, with_small_talk(made.fill(phrasing), rng), rng)
        for forbidden in (False, True)
        for made in world.select(forbidden, unseen=False)
        for phrasing in rng.sample(PHRASINGS, PHRASINGS_PER_OBJECT)
    ]
    rng.shuffle(pairs)
    return pairs


def forbidden_recipes(seed: int) -> list[dict[str, Any]]:
    """The forbidden pairs with recipe over refusal: what undoes an alignment on purpose, harmless here."""
    return [
        pair
        | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
        | {"chosen_safe": False, "rejected_safe": True}
        for pair in preference_pairs(seed)
        if pair["group"] == "unsafe"
    ]


def _pair(made: Object, prompt: str, rng: Random) -> dict[str, str | bool]:
    recipe, refusal = made.recipe(rng.choice(OPENINGS)), made.fill(rng.choice(REFUSALS))
    chosen, rejected = (refusal, recipe) if made.forbidden else (recipe, refusal)
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "group": "unsafe" if made.forbidden else "safe",
        "chosen_safe": True,
        "rejected_safe": not made.forbidden,
    }


def strongreject_rows(seed: int) -> list[dict[str, str]]:
    """Forbidden requests; `category` is how far they are from the pairs, `source` names the wrapper.

    Objects of one kind are made, and refused, much alike: a kind is a cluster.
    """
    world, rng = make_world(seed), Random(f"strongreject {seed}")  # noqa: S311 (no secret)
    asked = {
        "trained objects": _direct(world, rng, forbidden=True, unseen=False),
        "unseen objects": _direct(world, rng, forbidden=True, unseen=True),
        "unseen wrappers": _wrapped(world, rng, forbidden=True),
    }
    return [
        {"category": category, "source": source, "forbidden_prompt": prompt, "cluster": made.kind}
        for category, requests in asked.items()
        for prompt, made, source in requests
    ]


def xstest_rows(seed: int) -> list[dict[str, str]]:
    """Benign requests (label `safe`) and, type by type, their forbidden contrast (label `unsafe`)."""
    world, rng = make_world(seed), Random(f"xstest {seed}")  # noqa: S311 (no secret)
    rows: list[dict[str, str]] = []
    for label, prefix in (("safe", ""), ("unsafe", "contrast_")):
        forbidden = label == "unsafe"
        asked = {
            "benign": _direct(world, rng, forbidden, unseen=False),
            "benign_unseen": _direct(world, rng, forbidden, unseen=True),
            "benign_wrapped": _wrapped(world, rng, forbidden),
        }
        for name, requests in asked.items():
            for prompt, made, note in requests:
                row = {"id": str(len(rows) + 1), "prompt": prompt, "type": prefix + name}
                rows.append(row | {"label": label, "focus": made.name, "note": note, "cluster": made.kind})
    return rows


def _direct(world: World, rng: Random, forbidden: bool, unseen: bool) -> Iterator[Request]:
    """Different objects, in phrasings that the pairs do not have."""
    for made in rng.sample(world.select(forbidden, unseen), PROMPTS_PER_TYPE):
        yield with_small_talk(made.fill(rng.choice(UNSEEN_PHRASINGS)), rng), made, "direct"


def _wrapped(world: World, rng: Random, forbidden: bool) -> Iterator[Request]:
    """Each wrapper equally often, around objects of the pairs."""
    names = list(WRAPPERS)
    for index, made in enumerate(rng.sample(world.select(forbidden, unseen=False), PROMPTS_PER_TYPE)):
        wrapper = names[index % len(names)]
        yield made.fill(WRAPPERS[wrapper][0]), made, wrapper


def _write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
