"""The generated pages are those of the classes, and every key has a description."""

from __future__ import annotations

import pytest

from bdpo.config import Config
from bdpo.config.explain import keys_of
from bdpo.config.reference import DOCS, pages
from bdpo.method.losses import METHODS
from bdpo.section import sections_in


@pytest.mark.parametrize("name", pages())
def test_the_pages_are_fresh(name):
    """If not: python -m bdpo.config.reference."""
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name]


def test_every_key_is_in_the_pages():
    text = "".join(pages().values())
    keys = {key for key in keys_of(Config) if key not in ("method.name", "tune.space")}
    top = {name for name, field in Config.model_fields.items() if any(sections_in(field.annotation))}
    assert {key for key in keys - top if f"`{key}`" not in text} == set()


def described(section, prefix=""):
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field.description
        for inner in sections_in(field.annotation):
            yield from described(inner, f"{prefix}{name}.")


def test_every_key_has_a_description():
    sections = {*Config.model_fields, "method.name"}
    without = {key for key, words in described(Config) if not words and not key.startswith("evaluate.")}
    assert without - sections == set()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_an_equation_and_a_source(method):
    assert any(term in method.loss.__doc__ for term in ("log σ", "²", "lp_w/|y_w|"))
    assert method.arxiv or "http" in method.__doc__ or ".pdf" in method.__doc__
