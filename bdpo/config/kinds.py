"""Overrides of a section that comes in kinds: its short form, and another kind (`method.name=simpo`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bdpo.section import Section, Variant, sections_in


def written_out(values: dict[str, Any], key: str, value: Any, root: type[BaseModel]) -> str:
    """The key of an override, where the section may stand in its short form, `judge: rubric`.

    A short form in `values` on the way to the key becomes `judge: {name: rubric}`, in place, so that the
    section can take further keys; an override that is a short form itself is one of `judge.name`.
    """
    path = key.split(".")
    if isinstance(value, str) and _kinds(_field(path, root)):
        path.append("name")
    above, section = path[:-2], path[-2] if len(path) > 1 else ""
    if _kinds(_field(path[:-1], root)):
        for name in above:
            inside = values.get(name)
            values = inside if isinstance(inside, dict) else {}
        if isinstance(values.get(section), str):
            values[section] = {"name": values[section]}
    return ".".join(path)


def change_kind(values: dict[str, Any], path: Sequence[str], name: Any, root: type[BaseModel]) -> None:
    """Make the section at `path` one of the kind called `name`, in place; `root` is the config's class.

    A file that was written for one method, or that a run has saved, has the keys of that method. Those that
    the new kind does not have, or has another default for (beta of `simpo`, whose rewards are per token),
    are left out. A key that no kind has stays, so that it is refused. Nothing changes where the section does
    not come in kinds, or has no kind of that name.
    """
    field = _field(path, root)
    if field is None or not isinstance(name, str):  # a top-level key, or no name: validation refuses either
        return
    for section in path:
        inside = values.get(section)
        if not isinstance(inside, dict):
            return
        values = inside
    kinds, default = _kinds(field), field.get_default(call_default_factory=False)
    old = kinds.get(str(values.get("name", default.kind() if isinstance(default, Variant) else None)))
    if old is None or name not in kinds or kinds[name] is old:
        return
    for key in lost_keys(old, kinds[name]) & values.keys():
        del values[key]


def _field(path: Sequence[str], root: type[BaseModel]) -> FieldInfo | None:
    """The declaration of the section at `path`; None where there is no such section."""
    field = None
    for section in path:
        if section not in root.model_fields:
            return None
        field = root.model_fields[section]
        root = next(sections_in(field.annotation), Section)
    return field


def _kinds(field: FieldInfo | None) -> dict[str, type[Variant]]:
    """The kinds of a section by name; none if it does not come in kinds."""
    sections = sections_in(field.annotation) if field else ()
    return {kind.kind(): kind for kind in sections if issubclass(kind, Variant)}


def lost_keys(old: type[Variant], new: type[Variant]) -> set[str]:
    """The keys of kind `old` whose values are left out when a section becomes one of kind `new`.

    These are the keys that `new` does not have, or has with another default.
    """
    before, after = old.model_fields, new.model_fields
    return {key for key in before if key not in after or after[key].default != before[key].default}
