"""A pydantic error as the one line that a user reads: the key's full path, and the nearest known key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bdpo.section import Section, Variant, sections_in

_SHOWN = 80  # characters of a wrong value

# pydantic's names for the branches of a plain union and for the key of a dict
_TAGS = re.compile(r"int|str|list\[.*|\[key\]|<.*>")

_ITEM = re.compile(r"\.\d+(?=\.|$)")  # the number of an item of a list, in a dotted key

_NEAR, _SIMILAR = 0.75, 0.5  # of difflib: a slip of the keyboard, and another word for the same


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem, unknown keys before all else: a misspelt key is often why another is missing."""
    problem = _innermost(min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"), error)
    key, kinds = _locate(problem["loc"], root)
    context = problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        return _unknown(key, kinds, root)
    if problem["type"] == "missing":
        return f"key {key} is missing"
    if problem["type"] == "union_tag_invalid":
        return f"key {key}.name: {_one_of_quoted(context['expected_tags'], context['tag'])}"
    if problem["type"] == "literal_error":
        return f"key {key}: {_one_of_quoted(context['expected'], problem['input'])}"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"key {key}: expects a section with keys, got {shown(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict | Section) else f", got {shown(problem['input'])}"
    place = f"key {key}: " if key else ""  # of sections that do not go together the message names the keys
    return f"{place}{message}{given}"


def _innermost(problem: ErrorDetails, error: ValidationError) -> ErrorDetails:
    """The closest problem: of a value with several possible types pydantic lists what is wrong with each."""
    place = problem["loc"]
    if not place:  # of the config as a whole
        return problem
    if _TAGS.fullmatch(str(place[-1])):
        place = place[:-1]
    of_it = [other for other in error.errors() if other["loc"][: len(place)] == place]
    return max(of_it, key=lambda other: len(other["loc"]))


def shown(value: Any) -> str:
    """A wrong value on one line of printable characters, shortened."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def keys_of(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section and of the sections in it; of several kinds the keys of each."""
    for name, field in root.model_fields.items():
        yield prefix + name
        for section in sections_in(field.annotation):
            yield from keys_of(section, f"{prefix}{name}.")


def _locate(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[str, dict[str, type[Variant]]]:
    """The dotted key of pydantic's location, and by their keys the kinds of sections that it lies in."""
    names: list[str] = []
    kinds: dict[str, type[Variant]] = {}
    sections: list[type[BaseModel]] = [root]
    for part in loc:
        of_kind = [s for s in sections if issubclass(s, Variant) and s.kind() == part]
        if of_kind and len(sections) > 1:  # pydantic puts the kind behind the key of its union
            kinds[".".join(names)] = of_kind[0]
            sections = list(of_kind)
            continue
        of_name = [section for section in sections if section.__name__ == part]
        sections = of_name or sections  # pydantic names the class of a section that stands among other types
        if of_name or _TAGS.fullmatch(str(part)):
            continue
        names.append(str(part))
        fields = [s.model_fields[str(part)] for s in sections if str(part) in s.model_fields]
        if fields:
            sections = [section for field in fields for section in sections_in(field.annotation)]
    return ".".join(names), kinds


def _unknown(key: str, kinds: dict[str, type[Variant]], root: type[BaseModel]) -> str:
    """One line about a key that is not one, or is one of another kind of its section alone."""
    section, _, name = key.rpartition(".")
    known = list(keys_of(root))
    if section in kinds and key in known:
        kind = kinds[section]
        others = " and ".join(_kinds_with(name, section, root))
        own = [own for own in kind.model_fields if own != "name"]
        keys = f"its keys are {', '.join(own)}" if own else "it has none"
        return f"{section}.name={kind.kind()} has no key {name}, which belongs to {others}; {keys}"
    for prefix, kind in kinds.items():
        known = [
            k for k in known if k.rpartition(".")[0] != prefix or k.rpartition(".")[2] in kind.model_fields
        ]
    return f"unknown key {key}{_nearest(key, known)}"


def _kinds_with(name: str, section: str, root: type[BaseModel]) -> list[str]:
    """The kinds of a section that have a key."""
    sections: list[type[BaseModel]] = [root]
    for part in section.split("."):
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        sections = [found for field in fields for found in sections_in(field.annotation)]
    return [kind.kind() for kind in sections if issubclass(kind, Variant) and name in kind.model_fields]


def _nearest(key: str, known: Sequence[str]) -> str:
    """`; did you mean …?`: the whole path first, then the last name alone (right key, wrong section)."""
    section, _, leaf = key.rpartition(".")
    plain = _ITEM.sub("", key)  # in a list of sections, each item has the same keys
    close = difflib.get_close_matches(plain, known, 1, _NEAR)
    if close and plain != key and close[0].rpartition(".")[0] == _ITEM.sub("", section):
        close = [f"{section}.{close[0].rpartition('.')[2]}"]
    close = close or [k for k in known if k.rpartition(".")[2] == leaf][:1]
    close = close or difflib.get_close_matches(key, known, 1, _SIMILAR)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(names: Sequence[str], given: Any) -> str:
    """What a key with named values expects, and which of them was meant."""
    close = difflib.get_close_matches(str(given), names, 1, _SIMILAR)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"expects one of {', '.join(names)}, got {shown(given)}{meant}"


def _one_of_quoted(expected: str, given: Any) -> str:
    """The same of names that stand in quotes, as pydantic writes them."""
    names = re.findall(r"'([^']*)'", expected)
    return one_of(names or [expected], given)
