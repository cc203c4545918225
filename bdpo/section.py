"""What a config is made of: sections, and sections that come in several kinds.

A section is one class. A section of several kinds (`method`: one for each loss) is a union of `Variant`
classes, distinguished by their key `name`; each kind has only the keys that it looks at:

    AnyMethod = Annotated[Bdpo | Dpo | Simpo, Discriminator("name"), default_kind("bdpo")]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class _RuntimeOnly:
    """See `RUNTIME_ONLY`."""


RUNTIME_ONLY = _RuntimeOnly()
"""Marks a key that sets where, how often or in how much memory something runs.

    workers: Annotated[Positive, RUNTIME_ONLY] = 1

Such a key may change between a kill and the resume: results that exist stay valid, and those that are made
afterwards differ by rounding alone.
"""


class Section(BaseModel):
    """Base of every section: immutable, strict about types and finite, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def files(self) -> list[str]:
        """The files and folders that the section names, in a folder, a bucket or on a hub."""
        return []

    @classmethod
    def runtime_only_keys(cls) -> frozenset[str]:
        """The keys of this section that are marked `RUNTIME_ONLY`."""
        return frozenset(name for name, field in cls.model_fields.items() if RUNTIME_ONLY in field.metadata)

    def fingerprint(self) -> dict[str, Any]:
        """What results depend on: every key but those marked `RUNTIME_ONLY`, as plain values.

        Of a section of several kinds it holds the keys of its own kind, so that a key without effect never
        makes a difference.
        """
        runtime_only = self.runtime_only_keys()
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if name not in runtime_only and not field.exclude
        }


class Variant(Section):
    """One kind of a section that comes in several: its `name` is a `Literal` that is its own default."""

    name: str

    @classmethod
    def kind(cls) -> str:
        """The value of `name` by which a config chooses this kind."""
        return str(cls.model_fields["name"].default)


def default_kind(name: str) -> BeforeValidator:
    """Makes `name` the kind of a section whose config does not give one; a text is the kind in short.

    `judge: rubric` is short for `judge: {name: rubric}`.
    """

    def named(values: Any) -> Any:
        if isinstance(values, str):
            return {"name": values}
        return {"name": name, **values} if isinstance(values, dict) else values

    return BeforeValidator(named)


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a key of this type may hold: of `LoraConfig | None` one, of a union each kind."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is not dict:  # the keys of a dict are the user's own
        for part in get_args(annotation):
            yield from sections_in(part)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.fingerprint()
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value
