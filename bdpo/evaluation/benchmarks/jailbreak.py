"""Jailbreak transfer: attacks that were found on another model, tried on this one.

Artifacts of JailbreakBench (Chao et al., arXiv 2404.01318; `src/jailbreakbench/artifact.py` and
github.com/JailbreakBench/artifacts): a JSON file per attack (GCG, PAIR, ...) and attacked model. Those of the
past-tense attack (Andriushchenko & Flammarion, arXiv 2407.11969; github.com/tml-epfl/llm-past-tense,
`jailbreak_artifacts/`) have a schema of their own. `bdpo.evaluation.attacks` finds new ones, whose artifacts
may have a key `prefill`: what the assistant's turn begins with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from bdpo.config import EvaluateConfig
from bdpo.errors import UserError
from bdpo.evaluation.benchmarks.base import Benchmark, harm_measures
from bdpo.evaluation.benchmarks.items import Item
from bdpo.storage import strict_json
from bdpo.storage.paths import require_fetched
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
    return _with_topics(list(items.values()))


def _with_topics(items: list[Item]) -> list[Item]:
    """Each with a kind of harm, over which a limit can be spread.

    An artifact of the past-tense attack names none. The kind is that of the same request in another artifact,
    else that of the request before it, for artifacts are sorted by kinds. Where the kinds of most requests
    are unknown, each tenth of the artifact counts as one.
    """
    known = {item.cluster: item.topic for item in items if item.topic}
    found: list[Item] = []
    for _, group in groupby(items, key=lambda item: item.category):
        own = list(group)
        kinds = [item.topic or known.get(item.cluster, "") for item in own]
        if 2 * sum(map(bool, kinds)) < len(kinds):  # a few common requests say nothing of the others
            kinds = [""] * len(kinds)
        named = next(filter(None, kinds), "")
        for place, (item, kind) in enumerate(zip(own, kinds, strict=True)):
            named = kind or named
            found.append(replace(item, topic=named or f"tenth {10 * place // len(own)}"))
    return found


@dataclass(frozen=True)
class Artifact:
    """An artifact as it was published: the attack, and what was tried."""

    attack: str
    """The method and the model that was attacked."""
    entries: list[Any] = field(repr=False)
    """The elements of its list, as they are."""
    past_tense: bool = False
    """Whether they have the schema of the past-tense attack."""

    @classmethod
    def of(cls, content: Any, file: Path) -> Artifact:
        """The artifact in the content of a JSON file.

        Raises:
            UserError: it is none.
        """
        named = content if isinstance(content, dict) else {}
        if "jb_artifacts" in named:
            return cls(f"past_tense/{_text(named, 'target_model', str(file))}", _list(named, file), True)
        parameters = named.get("parameters")
        if not isinstance(parameters, dict) or not named.get("jailbreaks"):
            raise UserError(f"{file}: expects an object with `parameters` and a list of `jailbreaks`")
        attack = "/".join(_text(parameters, key, f"{file}, parameters") for key in ("method", "model"))
        return cls(attack, _list(named, file))


def is_artifact(content: Any) -> bool:
    """Whether the content of a JSON file is meant to be an artifact."""
    return isinstance(content, dict) and not {"jailbreaks", "jb_artifacts"}.isdisjoint(content)


def _artifact(file: Path) -> list[Item]:
    found = Artifact.of(_read(file), file)
    kind, item = ("artifact", _rewritten) if found.past_tense else ("jailbreak", _item)
    return [item(entry, found.attack, f"{file}, {kind} {n}") for n, entry in enumerate(found.entries, 1)]


def _list(content: dict[str, Any], file: Path) -> list[Any]:
    key = "jb_artifacts" if "jb_artifacts" in content else "jailbreaks"
    if not isinstance(content[key], list) or not content[key]:
        raise UserError(f"{file}: expects a list of `{key}`")
    return content[key]


def _rewritten(entry: Any, attack: str, where: str) -> Item:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expects an object")
    request, restart = (_number(entry, key, where) for key in ("i_request", "i_restart"))
    goal = _text(entry, "request", where)
    return Item(
        item_id=f"jailbreak-{attack}-{request}-{restart}",
        benchmark="jailbreak",
        category=attack,
        prompt=_text(entry, "request_reformulated", where),
        request=goal,
        should_comply=False,
        cluster=_cluster(goal),
    )


def _item(jailbreak: Any, attack: str, where: str) -> Item:
    if not isinstance(jailbreak, dict):
        raise UserError(f"{where}: expects an object")
    if "index" not in jailbreak or "prompt" not in jailbreak:
        raise UserError(f"{where}: expects the keys index and prompt")
    index = _number(jailbreak, "index", where)
    goal = _text(jailbreak, "goal", where)
    prefill = _text(jailbreak, "prefill", where) if jailbreak.get("prefill") else ""
    return Item(
        item_id=f"jailbreak-{attack}-{index}",
        benchmark="jailbreak",
        category=attack,
        prompt=None if jailbreak["prompt"] is None else _text(jailbreak, "prompt", where),
        request=goal,
        should_comply=False,
        prefill=prefill,
        prefill_tokens=len(prefill.encode()),  # all of them: a token has a byte at least
        topic=str(jailbreak.get("category") or ""),
        cluster=_cluster(goal),
    )


def _cluster(goal: str) -> str:
    """What artifacts of all sources call one request: a digest of its words, for numbers are given anew in
    each source, and the scores hold no text."""
    words = " ".join(re.findall(r"\w+", goal.casefold()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _number(values: dict[str, Any], key: str, where: str) -> str:
    """The digits of a whole number, which may be a text, without zeros before it."""
    digits = str(values.get(key))
    if not re.fullmatch(r"[0-9]{1,9}", digits):
        raise UserError(f"{where}, key {key}: expects a number")
    return str(int(digits))


def _text(values: dict[str, Any], key: str, where: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}, key {key}: expects a text that is not empty")
    if not strict_json.is_unicode(value):
        raise UserError(f"{where}, key {key}: is not valid Unicode (half of a surrogate pair)")
    return value


def _read(file: Path) -> Any:
    require_fetched(file)
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


BENCHMARK = Benchmark(
    "jailbreak", "Jailbreak", "harm", "safety", _configured, harm_measures(), asks_again=True
)
