"""Near twins: prompts of which one nearly repeats another, found by their character n-grams.

Held-out prompts that nearly repeat prompts of the search, or evaluation prompts that nearly repeat training
prompts, measure memory and not alignment. They are counted and not removed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from bdpo.evaluation.benchmarks.items import Item

if TYPE_CHECKING:
    from scipy.sparse import csr_array

LENGTH = 5
"""Characters of an n-gram."""

SIMILAR = 0.6
"""Jaccard similarity of the n-gram sets from which two prompts are near twins.

The largest multiple of 0.05 at which 99 % of small edits are found, by `python -m benchmarks.twins`. One in
nine of XSTest's unsafe prompts is then taken for a safe one worded alike; paraphrases are mostly missed.
"""

_LONGEST = 4000
"""Characters of a prompt that are looked at."""

_BATCH = 1024


def count_near_twins(items: Iterable[Item], others: Iterable[str]) -> dict[str, int]:
    """Benchmark -> how many of its requests have a near twin among `others`, of benchmarks that have any.

    A request that a benchmark asks several times, under several attacks for one, counts once.
    """
    asked = sorted({(item.benchmark, item.request) for item in items})
    found = near_twins([request for _, request in asked], others)
    twins = Counter(benchmark for (benchmark, _), twin in zip(asked, found, strict=True) if twin)
    return dict(twins)


def near_twins(prompts: Sequence[str], others: Iterable[str]) -> list[bool]:
    """Whether one of `others` is a near twin of a prompt, or the same, for each prompt.

    An exact search by an inverted index of the prompts: the memory is that of the n-grams of `prompts` and of
    1,024 others at a time, however many others there are.
    """
    from scipy.sparse import csr_array

    sets = [_ngrams(prompt) for prompt in prompts]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *sets]))
    index = _rows(sets, known)
    sizes = np.array([len(ngrams) for ngrams in sets])
    found = np.zeros(len(sets), bool)
    stream = iter(others)
    while batch := list(islice(stream, _BATCH)):
        other_sets = [_ngrams(other) for other in batch]
        shared = csr_array(index @ _rows(other_sets, known).T).tocoo()
        other_sizes = np.array([len(ngrams) for ngrams in other_sets])
        union = sizes[shared.row] + other_sizes[shared.col] - shared.data
        found[shared.row[shared.data >= SIMILAR * union]] = True
    return found.tolist()


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the n-gram sets of two prompts, in [0, 1]."""
    first, second = _ngrams(one), _ngrams(other)
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)


def _ngrams(text: str) -> np.ndarray:
    """Hashes of the distinct n-grams of a text, without case, punctuation and runs of spaces, sorted; none of
    a text without letters and digits, which is like no other."""
    words = " ".join(re.findall(r"\w+", text[:_LONGEST].lower()))
    if not words:
        return np.empty(0, np.uint64)
    codes = np.frombuffer(f" {words} ".ljust(LENGTH).encode("utf-32-le", "surrogatepass"), np.uint32)
    windows = np.lib.stride_tricks.sliding_window_view(codes.astype(np.uint64), LENGTH)
    powers = np.uint64(0x100000001B3) ** np.arange(LENGTH, dtype=np.uint64)  # wraps around, as a hash may
    return np.unique((windows * powers).sum(1, dtype=np.uint64))


def _rows(sets: Sequence[np.ndarray], known: np.ndarray) -> csr_array:
    """One row a set: 1 in the column of each n-gram that is known."""
    from scipy.sparse import csr_array

    number = np.repeat(np.arange(len(sets)), [len(ngrams) for ngrams in sets])
    ngrams = np.concatenate([np.empty(0, np.uint64), *sets])
    column = np.searchsorted(known, ngrams)
    column[column == len(known)] = 0
    kept = known[column] == ngrams if len(known) else np.zeros(len(ngrams), bool)
    ones = np.ones(int(kept.sum()), np.int32)
    return csr_array((ones, (number[kept], column[kept])), shape=(len(sets), max(1, len(known))))
