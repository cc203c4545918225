"""What is made ahead: the same items in the same order, one at most before its turn."""

from __future__ import annotations

import threading

import pytest

from bdpo.models.ahead import made_ahead


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_in_order(count):
    assert list(made_ahead(lambda item: item * 2, range(count))) == [2 * item for item in range(count)]


def test_the_next_one_is_made_while_the_caller_works_and_no_further_one():
    made, second = [], threading.Event()

    def make(item):
        made.append(item)
        if item == 1:
            second.set()
        return item

    found = made_ahead(make, range(5))
    assert next(found) == 0
    assert second.wait(10)
    assert made == [0, 1]
    found.close()
    assert made == [0, 1]


def test_an_error_is_raised_in_the_turn_of_its_item():
    found = made_ahead(lambda item: 1 // item, [2, 1, 0, 3])
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_without_a_thread_the_caller_makes_them(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(made_ahead(lambda item: item * 2, range(3))) == [0, 2, 4]
