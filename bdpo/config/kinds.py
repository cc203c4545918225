"""Changing the kind of a section (`method.name=simpo`) in a config that was written for another kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from bdpo.section import Section, Variant, sections_in


def change_kind(values: dict[str, Any], path: Sequence[str], name: Any, root: type[BaseModel]) -> None:
    """Make the section at `path` one of the kind called `name`, in place; `root` is the config's class.

    A file that was written for one method, or that a run has saved, has the keys of that method. Those that
    the new kind does not have, or has another default for (beta of `simpo`, whose rewards are per token),
    are left out. A key that no kind has stays, so that it is refused. Nothing changes where the section does
    not come in kinds, or has no kind of that name.
    """
    if not path or not isinstance(name, str):  # a top-level key, or no name: validation refuses either
        return
    for section in path:
        inside = values.get(section)
        if not isinstance(inside, dict) or section not in root.model_fields:
            return
        values, field = inside, root.model_fields[section]
        kinds = {kind.kind(): kind for kind in sections_in(field.annotation) if issubclass(kind, Variant)}
        root = next(sections_in(field.annotation), Section)
    default = field.get_default(call_default_factory=False)
    old = kinds.get(str(values.get("name", default.kind() if isinstance(default, Variant) else None)))
    if old is None or name not in kinds or kinds[name] is old:
        return
    for key in lost_keys(old, kinds[name]) & values.keys():
        del values[key]


def lost_keys(old: type[Variant], new: type[Variant]) -> set[str]:
    """The keys of kind `old` whose values are left out when a section becomes one of kind `new`.

    These are the keys that `new` does not have, or has with another default.
    """
    before, after = old.model_fields, new.model_fields
    return {key for key in before if key not in after or after[key].default != before[key].default}
