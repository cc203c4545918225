"""Which prefix groups make a batch, and which of them share a row: functions of lengths alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

MAX_GROUPS_IN_A_ROW = 16


def grid_cost(rows: int, width: int, hidden_size: int) -> float:
    """Operations of a grid in a transformer of this width, in those of the linear layers for one token.

    A token costs about 24·hidden_size² operations in the linear layers of a block and 4·hidden_size·width in
    its attention.
    """
    return rows * width * (1 + width / (6 * hidden_size))


def length_sorted_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices grouped into batches of similar length, longest first.

    A batch costs its longest row times its rows and stays within `tokens_per_batch`; a row that is
    longer than the budget makes a batch of its own. Ties keep their order, so the result is a function
    of the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def arrange(lengths: Sequence[int], common: int, hidden_size: int) -> list[list[int]]:
    """Indices in rows, so that a transformer of this width needs the fewest operations.

    Each row has `common` tokens besides. More groups in a row leave less padding and repeat the common
    tokens less often, but attention costs the square of the row. One group a row is among the candidates,
    so the grid is never larger than the longest group times the groups.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    total, longest = sum(lengths), lengths[order[0]]
    most = min(len(lengths), MAX_GROUPS_IN_A_ROW)
    best: list[list[int]] = []
    least = math.inf
    for rows in sorted({math.ceil(len(lengths) / in_a_row) for in_a_row in range(1, most + 1)}):
        # No row is narrower than this: most numbers of rows need not be tried.
        width = common + max(longest, math.ceil(total / rows))
        if grid_cost(rows, width, hidden_size) < least:
            loads, members = _balanced(lengths, order, rows)
            cost = grid_cost(rows, common + max(loads), hidden_size)
            if cost < least:
                best, least = members, cost
    return best


def _balanced(lengths: Sequence[int], order: Sequence[int], rows: int) -> tuple[list[int], list[list[int]]]:
    """(load, members) of each row: in this order, each to the row that is shortest so far (Graham's rule)."""
    heap = [(0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for index in order:
        load, row = heap[0]
        members[row].append(index)
        heapq.heapreplace(heap, (load + lengths[index], row))
    return [load for load, _ in heap], members
