"""YAML and dotted overrides -> plain values; the one line that says what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bdpo.errors import UserError


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as a string; people mean the number, as in YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """Quotes a text that `Loader` would read as a number: a revision `12e5`, for one."""


for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a config file as plain values; raises a UserError that names the file."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{file}: no such config file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: wants sections with keys, found {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Lay one `section.key=value` over `values`, in place; raises a UserError that names the key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: wants section.key=value")
    try:
        value = yaml.load(text, Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise UserError(f"override {key}: not valid YAML ({_one_line(error)})") from None
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:  # not there, or left empty in the YAML
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"override {key}: {section} is not a section")
    values[leaf] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem, unknown keys before all else: a misspelt key is often why another is missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    # pydantic's names for the branches of a union, for a key
    tags = re.compile(r"int|str|list\[.*|\[key\]|<.*>")
    names = [str(part) for part in problem["loc"] if not tags.fullmatch(str(part))]
    key = ".".join(names)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(key, root)}"
    if problem["type"] == "missing":
        return f"key {key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"key {key}: {message}{given}"


def _nearest(key: str, root: type[BaseModel]) -> str:
    """`; did you mean …?`: the whole path first, then the last name alone (right key, wrong section)."""
    known = list(_keys(root))
    close = difflib.get_close_matches(key, known, 1, 0.75)
    leaf = key.rpartition(".")[2]
    close = close or [k for k in known if k.rpartition(".")[2] == leaf][:1]
    close = close or difflib.get_close_matches(key, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):  # a section, or a section or None
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys(part, f"{prefix}{name}.")
