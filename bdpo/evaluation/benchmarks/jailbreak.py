"""Jailbreak transfer: attacks that were found on another model, tried on this one.

Artifacts of JailbreakBench (Chao et al., arXiv 2404.01318; `src/jailbreakbench/artifact.py` and
github.com/JailbreakBench/artifacts): a JSON file per attack (GCG, PAIR, ...) and attacked model. Those of the
past-tense attack (Andriushchenko & Flammarion, arXiv 2407.11969; github.com/tml-epfl/llm-past-tense,
`jailbreak_artifacts/`) have a schema of their own. `bdpo.evaluation.attacks` finds new ones, whose artifacts
may have a key `prefill`: what the assistant's turn begins with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import Benchmark, harm_measures
from bdpo.evaluation.benchmarks.items import Item
from bdpo.storage import strict_json
from bdpo.storage.strict_json import RepeatedKey


def load(files: Sequence[str | Path]) -> list[Item]:
    """The attacks of all artifacts; a category is the attack's method and the model that it was found on.

    The judge is given the original goal. A behaviour whose `prompt` is null has no attack: nothing is asked,
    so nothing is known of this model, and the item is counted as not asked. (Upstream's success rate divides
    by all behaviours, as it is a statement on the model that was attacked.)

    Raises:
        UserError: a file cannot be read or lacks what is used here, naming the jailbreak and the key; or
            two artifacts have the same method and model.
    """
    items: dict[str, Item] = {}
    for file in files:
        for item in _artifact(Path(file)):
            if item.item_id in items:
                raise UserError(f"{file}: {item.item_id} appears twice; is the artifact listed twice?")
            items[item.item_id] = item
    return list(items.values())


def _artifact(file: Path) -> list[Item]:
    content = _read(file)
    named = content if isinstance(content, dict) else {}
    if "jb_artifacts" in named:
        return _past_tense(named, file)
    parameters, jailbreaks = named.get("parameters"), named.get("jailbreaks")
    if not isinstance(parameters, dict) or not isinstance(jailbreaks, list) or not jailbreaks:
        raise UserError(f"{file}: expects an object with `parameters` and a list of `jailbreaks`")
    attack = "/".join(_text(parameters, key, f"{file}, parameters") for key in ("method", "model"))
    return [_item(jailbreak, attack, f"{file}, jailbreak {n}") for n, jailbreak in enumerate(jailbreaks, 1)]


def _past_tense(content: dict[str, Any], file: Path) -> list[Item]:
    """The requests of the past-tense attack: each rewritten, in one or several ways."""
    rewritten = content["jb_artifacts"]
    if not isinstance(rewritten, list) or not rewritten:
        raise UserError(f"{file}: expects a list of `jb_artifacts`")
    attack = f"past_tense/{_text(content, 'target_model', str(file))}"
    return [_rewritten(entry, attack, f"{file}, artifact {n}") for n, entry in enumerate(rewritten, 1)]


def _rewritten(entry: Any, attack: str, where: str) -> Item:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expects an object")
    request, restart = (_number(entry, key, where) for key in ("i_request", "i_restart"))
    return Item(
        item_id=f"jailbreak-{attack}-{request}-{restart}",
        benchmark="jailbreak",
        category=attack,
        prompt=_text(entry, "request_reformulated", where),
        request=_text(entry, "request", where),
        should_comply=False,
        cluster=request,
    )


def _item(jailbreak: Any, attack: str, where: str) -> Item:
    if not isinstance(jailbreak, dict):
        raise UserError(f"{where}: expects an object")
    if "index" not in jailbreak or "prompt" not in jailbreak:
        raise UserError(f"{where}: expects the keys index and prompt")
    index = _number(jailbreak, "index", where)
    prefill = _text(jailbreak, "prefill", where) if jailbreak.get("prefill") else ""
    return Item(
        item_id=f"jailbreak-{attack}-{index}",
        benchmark="jailbreak",
        category=attack,
        prompt=None if jailbreak["prompt"] is None else _text(jailbreak, "prompt", where),
        request=_text(jailbreak, "goal", where),
        should_comply=False,
        prefill=prefill,
        prefill_tokens=len(prefill.encode()),  # all of them: a token has a byte at least
        topic=str(jailbreak.get("category") or ""),
        cluster=index,
    )


def _number(values: dict[str, Any], key: str, where: str) -> str:
    """The digits of a whole number, which may be a text."""
    digits = str(values.get(key))
    if not re.fullmatch(r"\d{1,9}", digits):
        raise UserError(f"{where}, key {key}: expects a number")
    return digits


def _text(values: dict[str, Any], key: str, where: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}, key {key}: expects a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}, key {key}: is not valid Unicode (half of a surrogate pair)")
    return value


def _read(file: Path) -> Any:
    try:
        return strict_json.loads(file.read_text(encoding="utf-8"))
    except RepeatedKey:
        raise UserError(f"{file}: a key stands twice in an object") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # not UTF-8 or not JSON; the error's own text quotes the file
        raise UserError(f"{file}: not valid JSON") from None


def _configured(config: EvaluateConfig) -> list[Item]:
    if not config.jailbreak.paths:
        raise UserError("key evaluate.jailbreak.paths is missing: benchmark jailbreak expects artifacts")
    return load(config.jailbreak.paths)


BENCHMARK = Benchmark("jailbreak", "Jailbreak", "harm", _configured, harm_measures(), asks_again=True)
