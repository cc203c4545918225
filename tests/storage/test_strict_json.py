"""A key that stands twice in an object is found, in objects of any size."""

from __future__ import annotations

import pytest

from bdpo.storage.strict_json import RepeatedKey, _unique, loads


def test_a_key_that_stands_twice_is_named() -> None:
    with pytest.raises(RepeatedKey) as found:
        loads('{"a": [{"b": 1, "c": 2, "b": 3}]}')
    assert found.value.key == "b"
    assert loads('{"a": {"b": 1}, "b": 2}') == {"a": {"b": 1}, "b": 2}


class CountingName(str):
    """A name that counts how often it is compared."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountingName.comparisons += 1
        return str.__eq__(self, other)


def test_large_objects_are_looked_through_once() -> None:
    """A judge's reply may hold 100,000 keys: comparing each with each would take minutes."""
    names = [CountingName(f"{n:x}") for n in range(2000)]
    with pytest.raises(RepeatedKey) as found:
        _unique([*((name, 0) for name in names), (CountingName("7cf"), 1)])
    assert found.value.key == "7cf"
    assert CountingName.comparisons < 20 * len(names)
