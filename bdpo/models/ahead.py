"""Making what is needed next while the caller works with what it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`make` of each item in order; a thread makes the next one while the caller works with this one.

    What `make` raises is raised in the turn of its item. A caller that stops early leaves one item that is
    made for nothing.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        made = None
        for item in items:
            following = _submitted(thread, make, item)
            if made is not None:
                yield made.result()
            made = following
        if made is not None:
            yield made.result()


def _submitted(thread: ThreadPoolExecutor, make: Callable[[Item], Made], item: Item) -> Future[Made]:
    try:
        return thread.submit(make, item)
    except RuntimeError:  # memory does not suffice for another thread: the caller makes the item itself
        made: Future[Made] = Future()
        made.set_result(make(item))
        return made
