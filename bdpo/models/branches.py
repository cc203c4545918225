"""Continuations that leave one context at different tokens -> rows in which what they share is computed once.

A branch is a position of the context and the tokens that replace all that stands from there on: a suffix
with one token changed, and what follows it. The context is forwarded once, and its keys and values are kept
for all rows, `[branch_1 | branch_2 ...]`: a branch sees the context before its start and itself, and its
positions begin at its start. The prefix groups of `bdpo.models.packing` leave their context at its end alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from bdpo.models.arrangement import arrange
from bdpo.models.packing import Batch


@dataclass(frozen=True)
class Branch:
    """`ids` in the place of the context's tokens from `start` on; the last `scored` of them are predicted.

    The token before the first predicted one is the branch's own: `scored` is less than the number of ids.
    `start` is at least 1.
    """

    start: int
    ids: Sequence[int]
    scored: int


def pack_branches(branches: Sequence[Branch], hidden_size: int) -> Batch:
    """Branches in rows, without the context: its keys and values are there when the rows are forwarded.

    The mask, for attention that takes one, is bool, (rows, 1, width, context + width): the context is the
    tokens before the last branch's start, and a branch sees those before its own.
    """
    context = max(branch.start for branch in branches)
    rows = arrange([len(branch.ids) - 1 for branch in branches], 0, hidden_size)
    lines: list[torch.Tensor] = []
    predicted_at: dict[int, list[tuple[int, int]]] = {}
    for row, members in enumerate(rows):
        cells: list[tuple[int, int, int, int]] = []  # token, position, the branch's number from 1, its start
        for number in members:
            branch, first = branches[number], len(cells)
            # the last token predicts none of the branch, so it is not forwarded
            cells += [(t, p, number + 1, branch.start) for p, t in enumerate(branch.ids[:-1], branch.start)]
            last = first + len(branch.ids) - 1
            predicted_at[number] = [(row, column) for column in range(last - branch.scored, last)]
        lines.append(torch.tensor(cells))
    columns = (pad_sequence([line[:, i] for line in lines], batch_first=True) for i in range(4))
    input_ids, position_ids, branch_of, start = columns
    index = torch.arange(input_ids.shape[1])
    own = (branch_of[:, :, None] == branch_of[:, None, :]) & (index[None, :] <= index[:, None])
    shared = torch.arange(context) < start[:, :, None]
    mask = torch.cat([shared, own], 2)[:, None]
    return _batch(branches, input_ids, position_ids, mask, predicted_at)


def plain_branches(context: Sequence[int], branches: Sequence[Branch]) -> Batch:
    """A row for each branch with the context before it, padded on the right: for other models."""
    rows = [[*context[: branch.start], *branch.ids] for branch in branches]
    ids = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True)
    predicted_at = {
        number: [(number, column) for column in range(len(row) - 1 - branch.scored, len(row) - 1)]
        for number, (row, branch) in enumerate(zip(rows, branches, strict=True))
    }
    return _batch(branches, pad_sequence(ids, batch_first=True), None, mask, predicted_at)


def _batch(
    branches: Sequence[Branch],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor,
    predicted_at: dict[int, list[tuple[int, int]]],
) -> Batch:
    cells = [cell for number in range(len(branches)) for cell in predicted_at[number]]
    row, column = torch.tensor(cells).unbind(1)
    return Batch(
        input_ids,
        position_ids,
        mask,
        logit_positions=row * input_ids.shape[1] + column,
        targets=torch.tensor([token for branch in branches for token in branch.ids[-branch.scored :]]),
        responses=torch.repeat_interleave(torch.tensor([branch.scored for branch in branches])),
    )
