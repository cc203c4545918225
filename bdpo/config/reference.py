"""The pages docs/config.md and docs/methods.md, made from the classes: `python -m bdpo.config.reference`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from bdpo.config import Config
from bdpo.config.gate import Condition, GateConfig
from bdpo.method.base import Method
from bdpo.method.losses import METHODS
from bdpo.section import RUNTIME_ONLY, Section, Variant, sections_in

DOCS = Path(__file__).parents[2] / "docs"

_NOTE = "<!-- Made by `python -m bdpo.config.reference` from the classes; do not edit. -->"

_GATES = "The file of `python -m pipelines.gate` is no part of a run's config."

_NAMES: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    NoneType: "null",
    Any: "any value",
}

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def pages() -> dict[str, str]:
    """The content of each generated page, by its file name in docs/."""
    return {"config.md": config_page(), "methods.md": methods_page()}


def config_page() -> str:
    """Every key of the config: a table for each section, in the order of the config."""
    top = [name for name, field in Config.model_fields.items() if not list(sections_in(field.annotation))]
    lines = [
        _NOTE,
        "# Config",
        "Defaults < YAML file < `section.key=value` on the command line. A key without a default is "
        "required. Keys marked † set where, how often or in how much memory something runs: they may change "
        "between a kill and the resume.",
        _table(Config, "", top),
    ]
    for name, field in Config.model_fields.items():
        sections = list(sections_in(field.annotation))
        if name == "method":
            lines += ["## `method`", "Each method has keys of its own: see [methods.md](methods.md)."]
        elif sections:
            lines += [line for section in sections for line in _section(section, name)]
    lines += ["## Gate files", _GATES, *_part(GateConfig, ""), "### `conditions`", *_part(Condition, "")]
    return "\n\n".join(lines) + "\n"


def methods_page() -> str:
    """Every method: what it does, its equation, what it requires, and its keys."""
    rows = [
        f"| [`{name}`](#{name}) | {_first_sentence(method)} | {_requires(method)} | {_paper(method)} |"
        for name, method in METHODS.items()
    ]
    lines = [
        _NOTE,
        "# Methods",
        "`method.name` chooses the loss. Each method has only the keys that its loss looks at; a key of "
        "another method is refused.",
        "\n".join(["| `method.name` | what it does | requires | source |", "|---|---|---|---|", *rows]),
        "w is the chosen response, l the rejected one; lp = log π(y|c(x)), summed over the |y| response "
        "tokens; Δ = lp − log π_ref(y|c(x)).",
    ]
    for name, method in METHODS.items():
        equation = inspect.getdoc(method.loss) or ""
        keys = [key for key in method.model_fields if key != "name"]
        lines += [
            f"## {name}",
            _words(method),
            f"Loss: {equation}",
            f"Source: {_paper(method)}. Requires {_requires(method)}."
            if method.arxiv
            else f"Requires {_requires(method)}.",
            _table(method, "method.", keys) if keys else "It has no keys.",
            *(
                line
                for key in keys
                for inner in sections_in(method.model_fields[key].annotation)
                for line in _section(inner, f"method.{key}", level=3)
            ),
        ]
    return "\n\n".join(lines) + "\n"


def _section(section: type[Section], key: str, level: int = 2) -> Iterator[str]:
    """The heading, the words and the table of a section, and those of the sections in it."""
    kind = f": `{section.kind()}`" if issubclass(section, Variant) else ""
    yield f"{'#' * level} `{key}`{kind}"
    yield from _part(section, f"{key}.")
    for name, field in section.model_fields.items():
        for inner in sections_in(field.annotation):
            yield from _section(inner, f"{key}.{name}", level + 1)


def _part(section: type[Section], prefix: str) -> list[str]:
    """The words and the table of a section."""
    return [_words(section), _table(section, prefix, list(section.model_fields))]


def _table(section: type[Section], prefix: str, keys: list[str]) -> str:
    rows = [_row(prefix, key, section.model_fields[key]) for key in keys]
    return "\n".join(["| key | type | default | what it does |", "|---|---|---|---|", *rows])


def _row(prefix: str, key: str, field: FieldInfo) -> str:
    mark = " †" if RUNTIME_ONLY in field.metadata else ""
    cells = (f"`{prefix}{key}`{mark}", _type(field), _default(field), field.description or "")
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Section):
        return "see below"
    if isinstance(default, dict):
        return "; ".join(f"{key}: {_value(value)}" for key, value in default.items())
    return _value(default)


def _value(value: Any) -> str:
    if isinstance(value, Section):
        return f"`{{{', '.join(f'{key}: {_bare(part)}' for key, part in value.model_dump().items())}}}`"
    return f"`{_bare(value)}`"


def _bare(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(_bare(part) for part in value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(part, name)}"
        for part in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(part, name)
    ]
    return ", ".join([_named(field.annotation), *bounds])


def _named(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _named(parts[0])
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        kinds = [part for part in sections_in(annotation) if issubclass(part, Variant)]
        if kinds:
            return "section, one of " + ", ".join(f"`{kind.kind()}`" for kind in kinds)
        return " or ".join(_named(part) for part in parts)
    if origin is list:
        return f"list of {_named(parts[0])}"
    if origin is dict:
        return f"{_named(parts[0])} → {_named(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return _NAMES[annotation]


def _words(section: type[Section]) -> str:
    """The docstring without line breaks inside its paragraphs."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(section) or "")


def _first_sentence(section: type[Section]) -> str:
    return _words(section).split("\n\n")[0]


def _requires(method: type[Method]) -> str:
    needs = [
        "scores of the reference model" if method.requires_reference else "pairs alone",
        *(["safety labels"] if method.requires_safety_labels else []),
    ]
    return ", ".join(needs)


def _paper(method: type[Method]) -> str:
    return f"[{method.arxiv}](https://arxiv.org/abs/{method.arxiv})" if method.arxiv else ""


if __name__ == "__main__":
    for name, page in pages().items():
        (DOCS / name).write_text(page, encoding="utf-8")
