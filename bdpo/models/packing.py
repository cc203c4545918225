"""Responses behind their contexts -> rows of one padded shape in which every context is computed once.

A prefix group is a context and the responses that continue it, written as `[c | y_1 | y_2 ...]`: the
positions of each response restart at |c|, and a mask hides the responses from each other. A batch is a
grid of rows, each with as many prefix groups as cost the fewest operations. Which pairs make a batch is
decided from lengths alone; how a model is applied to the batch is in `bdpo.models.logps`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


MAX_GROUPS_IN_A_ROW = 16


@dataclass(frozen=True)
class PrefixGroup:
    """Token ids of a context and of the responses to it, none of which is empty."""

    context: Sequence[int]
    responses: Sequence[Sequence[int]]

    def tokens(self, shared: bool) -> int:
        """What the group costs: the context once, or a row a response, all as long as the longest."""
        return group_tokens(len(self.context), [len(response) for response in self.responses], shared)


@dataclass(frozen=True)
class Batch:
    """One forward pass; `targets` are the tokens of all responses of all groups, one after the other.

    `input_ids` (rows, width); `position_ids` the same, None where the model's own are right;
    `attention_mask` bool, (rows, 1, width, width) True where a token sees another, or (rows, width)
    True where there is a token; a BlockMask in place of the former for FlexAttention. Shape (response
    tokens,): `logit_positions`, indices into rows x width of the hidden states that predict the `targets`,
    and `responses`, which response each belongs to.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | BlockMask
    logit_positions: torch.Tensor
    targets: torch.Tensor
    responses: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        moved: list[Any] = [tensor if tensor is None else tensor.to(device) for tensor in tensors]
        return Batch(*moved)


def group_tokens(context: int, responses: Sequence[int], shared: bool) -> int:
    """Padded tokens of a prefix group of these lengths in shared rows, or in plain rows."""
    return context + sum(responses) if shared else len(responses) * (context + max(responses))


@dataclass(frozen=True)
class PairLayout:
    """How a model of this width takes pairs: all responses behind one prompt, or a row for each of them."""

    hidden_size: int
    shared: bool
    responses: int = 2
    """Of each pair are forwarded."""

    def tokens(self, prompt: int, *responses: int) -> int:
        """What a pair of these lengths takes of a grid: the unit of the lengths below."""
        return group_tokens(prompt, responses, self.shared)

    def grid(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(rows, width) of a batch of pairs of these lengths."""
        if not self.shared:
            return self.responses * len(lengths), max(lengths, default=0) // self.responses
        rows = arrange(lengths, 0, self.hidden_size) if lengths else []
        return len(rows), max((sum(lengths[index] for index in row) for row in rows), default=0)

    def fits(self, lengths: Sequence[int], tokens: int) -> bool:
        """Whether the grid of a batch has at most so many tokens; one pair always counts as fitting."""
        # The grid has at most a row a pair, see `arrange`: that is cheap to compute and mostly enough.
        return (
            len(lengths) <= 1
            or len(lengths) * max(lengths) <= tokens
            or math.prod(self.grid(lengths)) <= tokens
        )

    def cost(self, lengths: Sequence[int]) -> float:
        """Operations of the grid of a batch, see `grid_cost`."""
        return grid_cost(*self.grid(lengths), self.hidden_size)


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

    def cost(rows: list[list[int]]) -> float:
        width = common + max(sum(lengths[index] for index in row) for row in rows)
        return grid_cost(len(rows), width, hidden_size)

    most = min(len(lengths), MAX_GROUPS_IN_A_ROW)
    row_counts = sorted({math.ceil(len(lengths) / in_a_row) for in_a_row in range(1, most + 1)})
    return min((_balanced(lengths, rows) for rows in row_counts), key=cost)


def pack(groups: Sequence[PrefixGroup], hidden_size: int, flex: torch.device | None = None) -> Batch:
    """Shared rows: several groups a row; a context that all groups have in common is there once a row.

    The mask is a BlockMask for FlexAttention on the device `flex`, or without it a tensor. A BlockMask
    cannot be moved, for it holds on to the tensors that its `mask_mod` looks into.
    """
    common = groups[0].context if all(group.context == groups[0].context for group in groups) else []
    rows = arrange([group.tokens(shared=True) - len(common) for group in groups], len(common), hidden_size)
    lines: list[torch.Tensor] = []
    logit_positions: dict[tuple[int, int], list[tuple[int, int]]] = {}  # response -> (row, column)s
    for row, members in enumerate(rows):
        cells = [(token, position, 0, 0) for position, token in enumerate(common)]  # see _sees
        for number in members:
            group, end = groups[number], len(common)
            group_id = 0 if common else number
            if not common:
                cells += [(token, position, group_id, 0) for position, token in enumerate(group.context)]
                end = len(cells)
            for response_number, response in enumerate(group.responses):
                # The column where a response starts is never 0 and differs from every other response's in
                # the row, so it serves as the response's number in the mask.
                start = len(cells)
                cells += [
                    (t, position, group_id, start) for position, t in enumerate(response, len(group.context))
                ]
                # The first token is predicted at the context's last position, every other one at the
                # token before it. The responses share that last position: nothing is copied for them.
                before = [end - 1, *range(start, len(cells) - 1)]
                logit_positions[number, response_number] = [(row, column) for column in before]
        lines.append(torch.tensor(cells))
    columns = (pad_sequence([line[:, i] for line in lines], batch_first=True) for i in range(4))
    input_ids, position_ids, group_of, response_of = columns
    cells_in_order = [cell for key in sorted(logit_positions) for cell in logit_positions[key]]
    mask = _dense(group_of, response_of) if flex is None else _blocks(group_of.to(flex), response_of.to(flex))
    return _batch(groups, input_ids, position_ids, mask, cells_in_order)


def pack_plain(groups: Sequence[PrefixGroup]) -> Batch:
    """Plain rows: each response behind a context of its own, padded on the right."""
    rows = [(group.context, response) for group in groups for response in group.responses]
    ids = [torch.tensor([*context, *response]) for context, response in rows]
    return _batch(
        groups,
        pad_sequence(ids, batch_first=True),
        None,
        pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True),
        [(row, len(c) - 1 + k) for row, (c, response) in enumerate(rows) for k in range(len(response))],
    )


def _sees(group_of: torch.Tensor, response_of: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Whether a token sees another, from the prefix group and the response that each belongs to.

    Both tensors have the shape (rows, width); `response_of` is 0 in a context. A token sees what stands
    before it in its own group and is context or its own response. Padding stands last in its row, so that
    no other token sees it; it sees itself, because a softmax over nothing is not a number. Returned is a
    `mask_mod` of FlexAttention, a function of indices.
    """

    def sees(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        same_group = group_of[row, query] == group_of[row, key]
        same_response = response_of[row, query] == response_of[row, key]
        return (key <= query) & same_group & (same_response | (response_of[row, key] == 0))

    return sees


def _dense(group_of: torch.Tensor, response_of: torch.Tensor) -> torch.Tensor:
    """(rows, 1, width, width), for SDPA."""
    rows, width = map(torch.arange, group_of.shape)
    return _sees(group_of, response_of)(rows[:, None, None, None], 0, width[:, None], width)


def _blocks(group_of: torch.Tensor, response_of: torch.Tensor) -> BlockMask:
    """The same for FlexAttention, which skips blocks of the grid where nobody sees anybody."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = group_of.shape
    return create_block_mask(_sees(group_of, response_of), rows, None, width, width, device=group_of.device)


def _balanced(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Longest first, each to the row that is shortest so far (Graham's rule)."""
    heap: list[tuple[int, list[int]]] = [(0, [row]) for row in range(rows)]  # [row, *members]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, row = heap[0]
        heapq.heapreplace(heap, (load + lengths[index], [*row, index]))
    return [members for _, (_, *members) in sorted(heap, key=lambda item: item[1][0])]


def _batch(
    groups: Sequence[PrefixGroup],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | BlockMask,
    logit_positions: Sequence[tuple[int, int]],
) -> Batch:
    responses = [response for group in groups for response in group.responses]
    row, column = torch.tensor(logit_positions).unbind(1)
    counts = torch.tensor([len(response) for response in responses])
    return Batch(
        input_ids,
        position_ids,
        attention_mask,
        logit_positions=row * input_ids.shape[1] + column,
        targets=torch.tensor([token for response in responses for token in response]),
        responses=torch.repeat_interleave(counts),
    )
