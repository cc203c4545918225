"""YAML and dotted overrides -> plain values."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from bdpo.errors import UserError

_MOST_VALUES = 100_000  # aliases make a few lines of YAML into more than any memory holds

_LONGEST = 4096  # bytes: PATH_MAX of Linux, and no other text of a config is longer

_SHOWN = 100  # characters of a text in a message

_OTHER_BASE = re.compile(r"[-+]?(?:0[0-9_]+|[0-9_]+(?::[0-9]+)+)")

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # control characters, lone surrogates


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as a string; people mean the number, as in YAML 1.2. No key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses a key that stands twice in one mapping: the last one would win without a word."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuses what YAML 1.1 reads as octal (`010` is 8) or as of base 60 (`1:30` is 90)."""
        number: int = super().construct_yaml_int(node)
        if _OTHER_BASE.fullmatch(node.value):
            problem = f"{node.value} is {number} in YAML; write that, or quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


class Dumper(yaml.SafeDumper):
    """Quotes a text that `Loader` would read as a number: a revision `12e5`, for one."""


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)

for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a config file as plain values; raises a UserError that names the file."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{short(file)}: no such config file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid YAML ({_one_line(error)})") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(f"{short(file)}: cannot be read ({getattr(error, 'strerror', error)})") from None
    return parse_yaml(text, str(file))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The sections of a config as plain values.

    Raises:
        UserError: one line that names `source`: not valid YAML, no mapping, or an alias that contains itself.
    """
    values = _load(text, source)
    if values is None:
        raise UserError(f"{source}: is empty; expects sections with keys")
    if not isinstance(values, dict):
        raise UserError(f"{source}: expects sections with keys, found {type(values).__name__}")
    return values


def parse_override(override: str) -> tuple[str, Any]:
    """(key, value) of `section.key=value`; raises a UserError that names the override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {short(override)}: expects section.key=value")
    value = _load(text, f"override {short(key)}")
    node = yaml.compose(text, Loader)
    if text[node.end_mark.index if node else 0 :].strip():  # YAML would cut it off
        raise UserError(f"override {short(key)}: what stands behind # is a comment in YAML; quote the value")
    return key, value


def set_value(values: dict[str, Any], key: str, value: Any, source: str = "override") -> None:
    """Put a value at a dotted key, in place; raises a UserError that names `source` and the key."""
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:  # not there, or left empty in the YAML
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"{source} {short(key)}: {short(section)} is not a section")
    values[leaf] = value


def _load(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{source}{line}: not valid YAML ({_one_line(error.problem or error)})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML ({_one_line(error)})") from None
    # A value that is not what its form or its tag promises, as 2026-02-30 or !!int abc
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(
            f"{source}: not a value of YAML ({_one_line(error)}); quote it if it is text"
        ) from None


def require_tree(values: Any, source: str) -> None:
    """Refuse aliases that lead into themselves or make too many values, and text that is no text.

    Raises:
        UserError: one line that names the key.
    """
    todo: list[tuple[Any, str, tuple[int, ...]]] = [(values, "", ())]
    seen = 0
    while todo:
        value, key, around = todo.pop()
        seen += 1
        if id(value) in around:
            raise UserError(f"{source}: key {key}: an alias that leads into itself")
        if seen > _MOST_VALUES:
            raise UserError(f"{source}: more than {_MOST_VALUES:,} values")
        if isinstance(value, str):
            _require_text(value, f"{source}: key {key}" if key else source)
        elif isinstance(value, dict):
            for name, part in value.items():
                _require_text(str(name), f"{source}: a key")
                todo.append((part, f"{key}.{name}" if key else str(name), (*around, id(value))))
        elif isinstance(value, list):
            todo += [(part, key, (*around, id(value))) for part in value]


def _require_text(text: str, what: str) -> None:
    if found := _UNPRINTABLE.search(text):
        raise UserError(f"{what}: holds the character {found[0]!a}, which is not text")
    if len(text.encode()) > _LONGEST:
        raise UserError(f"{what}: {len(text):,} characters, expects at most {_LONGEST:,} bytes")


def short(text: object) -> str:
    """The text for a message: without control characters and line breaks, not longer than a line."""
    shown = str(text) if str(text).isprintable() else ascii(str(text))[1:-1]
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _one_line(error: object) -> str:
    return short(" ".join(str(error).split()))
