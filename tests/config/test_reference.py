"""The generated pages are those of the classes, and every key has a description."""

from __future__ import annotations

import pytest

from bdpo.config import Config
from bdpo.config.explain import keys_of
from bdpo.config.reference import DOCS, pages
from bdpo.method.losses import METHODS
from bdpo.section import RUNTIME_ONLY, Variant, sections_in


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
    """(key, description) of every key that is no section and does not choose the kind of its section."""
    for name, field in section.model_fields.items():
        inner_sections = list(sections_in(field.annotation))
        if not inner_sections and not (issubclass(section, Variant) and name == "name"):
            yield f"{prefix}{name}", field.description
        for inner in inner_sections:
            yield from described(inner, f"{prefix}{name}.")


def test_every_key_has_a_description():
    assert {key for key, words in described(Config) if not words} == set()


def test_every_key_that_says_where_or_how_often_may_change():
    """What the same key of another section is marked with, it is marked with as well."""
    marked = {key for key, is_marked in marks(Config) if is_marked}
    names = {key.rpartition(".")[2] for key in marked}
    unmarked = {key for key, is_marked in marks(Config) if not is_marked}
    assert {key for key in unmarked if key.rpartition(".")[2] in names} == set()
    assert {"evaluate.workers", "score.shard_rows", "tune.num_samples"} <= marked


def marks(section, prefix=""):
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", RUNTIME_ONLY in field.metadata
        for inner in sections_in(field.annotation):
            yield from marks(inner, f"{prefix}{name}.")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_an_equation_and_a_source(method):
    assert any(term in method.loss.__doc__ for term in ("log σ", "²", "lp_w/|y_w|"))
    assert method.arxiv or "http" in method.__doc__ or ".pdf" in method.__doc__
