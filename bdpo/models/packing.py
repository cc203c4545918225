"""Responses behind their contexts -> rows of one padded shape in which every context is there once.

A tree is a context and the responses that continue it, written as `[c | y_1 | y_2 ...]`: the positions
of each response restart at |c|, and a mask hides the responses from each other. A batch is a grid of
rows, each with as many trees as cost the fewest operations. Which pairs make a batch is decided from
lengths alone; what a model makes of the batch is in `bdpo.models.logps`.
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


MAX_TREES_IN_A_ROW = 16


@dataclass(frozen=True)
class Tree:
    """Token ids of a context and of the responses to it, none of which is empty."""

    context: Sequence[int]
    responses: Sequence[Sequence[int]]

    def tokens(self, shared: bool) -> int:
        """What the tree costs: the context once, or a row a response, all as long as the longest."""
        return tree_tokens(len(self.context), [len(response) for response in self.responses], shared)


@dataclass(frozen=True)
class Batch:
    """One forward pass; `targets` are the tokens of all responses of all trees, one after the other.

    `input_ids` (rows, width); `position_ids` the same, None where the model's own are right;
    `attention_mask` bool, (rows, 1, width, width) True where a token sees another, or (rows, width)
    True where there is a token; a BlockMask in place of the former for FlexAttention. Shape (response
    tokens,): `predictors`, indices into rows x width of the hidden states that predict the `targets`,
    and `responses`, which response each belongs to.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | BlockMask
    predictors: torch.Tensor
    targets: torch.Tensor
    responses: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        moved: list[Any] = [tensor if tensor is None else tensor.to(device) for tensor in tensors]
        return Batch(*moved)


def tree_tokens(context: int, responses: Sequence[int], shared: bool) -> int:
    """Padded tokens of a tree of these lengths in shared rows, or in plain rows."""
    return context + sum(responses) if shared else len(responses) * (context + max(responses))


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

    Each row has `common` tokens besides. More trees in a row leave less padding and repeat the common
    tokens less often, but attention costs the square of the row. A token costs about 24·hidden_size²
    operations in the linear layers of a block and 4·hidden_size·width in its attention. One tree a row
    is among the candidates, so the grid is never larger than the longest tree times the trees.
    """

    def cost(rows: list[list[int]]) -> float:
        width = common + max(sum(lengths[index] for index in row) for row in rows)
        return len(rows) * width * (1 + width / (6 * hidden_size))

    most = min(len(lengths), MAX_TREES_IN_A_ROW)
    row_counts = sorted({math.ceil(len(lengths) / in_a_row) for in_a_row in range(1, most + 1)})
    return min((_balanced(lengths, rows) for rows in row_counts), key=cost)


def pack(trees: Sequence[Tree], hidden_size: int, flex: torch.device | None = None) -> Batch:
    """Shared rows: several trees a row; a context that all trees have in common is there once a row.

    The mask is a BlockMask for FlexAttention on the device `flex`, or without it a tensor. A BlockMask
    cannot be moved, for it holds on to the tensors that its `mask_mod` looks into.
    """
    common = trees[0].context if all(tree.context == trees[0].context for tree in trees) else []
    rows = arrange([tree.tokens(shared=True) - len(common) for tree in trees], len(common), hidden_size)
    lines: list[torch.Tensor] = []
    predictors: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of each response: (row, column)s
    for row, members in enumerate(rows):
        cells = [(token, position, 0, 0) for position, token in enumerate(common)]  # see _sees
        for number in members:
            tree, end = trees[number], len(common)
            root = 0 if common else number
            if not common:
                cells += [(token, position, root, 0) for position, token in enumerate(tree.context)]
                end = len(cells)
            for branch, response in enumerate(tree.responses):
                start = len(cells)
                cells += [
                    (t, position, root, start) for position, t in enumerate(response, len(tree.context))
                ]
                before = [end - 1, *range(start, len(cells) - 1)]
                predictors[number, branch] = [(row, column) for column in before]
        lines.append(torch.tensor(cells))
    columns = (pad_sequence([line[:, i] for line in lines], batch_first=True) for i in range(4))
    input_ids, position_ids, root_of, branch_of = columns
    cells_in_order = [cell for key in sorted(predictors) for cell in predictors[key]]
    mask = _dense(root_of, branch_of) if flex is None else _blocks(root_of.to(flex), branch_of.to(flex))
    return _batch(trees, input_ids, position_ids, mask, cells_in_order)


def pack_plain(trees: Sequence[Tree]) -> Batch:
    """Plain rows: each response behind a context of its own, padded on the right."""
    rows = [(tree.context, response) for tree in trees for response in tree.responses]
    ids = [torch.tensor([*context, *response]) for context, response in rows]
    return _batch(
        trees,
        pad_sequence(ids, batch_first=True),
        None,
        pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True),
        [(row, len(c) - 1 + k) for row, (c, response) in enumerate(rows) for k in range(len(response))],
    )


def _sees(root_of: torch.Tensor, branch_of: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Whether a token sees another, from the tree and the branch of each, both (rows, width).

    A token sees what stands before it in its own tree and is context (branch 0) or its own response.
    Padding stands last in its row, so that no other token sees it; it sees something, as softmax wants.
    Returned is a `mask_mod` of FlexAttention, a function of indices.
    """

    def sees(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        same_root = root_of[row, query] == root_of[row, key]
        same_branch = branch_of[row, query] == branch_of[row, key]
        return (key <= query) & same_root & (same_branch | (branch_of[row, key] == 0))

    return sees


def _dense(root_of: torch.Tensor, branch_of: torch.Tensor) -> torch.Tensor:
    """(rows, 1, width, width), for SDPA."""
    rows, width = map(torch.arange, root_of.shape)
    return _sees(root_of, branch_of)(rows[:, None, None, None], 0, width[:, None], width)


def _blocks(root_of: torch.Tensor, branch_of: torch.Tensor) -> BlockMask:
    """The same for FlexAttention, which skips blocks of the grid where nobody sees anybody."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = root_of.shape
    return create_block_mask(_sees(root_of, branch_of), rows, None, width, width, device=root_of.device)


def _balanced(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Longest first, each to the row that is shortest so far (Graham's rule)."""
    heap: list[tuple[int, list[int]]] = [(0, [row]) for row in range(rows)]  # [row, *members]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        load, row = heap[0]
        heapq.heapreplace(heap, (load + lengths[index], [*row, index]))
    return [members for _, (_, *members) in sorted(heap, key=lambda item: item[1][0])]


def _batch(
    trees: Sequence[Tree],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | BlockMask,
    predictors: Sequence[tuple[int, int]],
) -> Batch:
    responses = [response for tree in trees for response in tree.responses]
    row, column = torch.tensor(predictors).unbind(1)
    counts = torch.tensor([len(response) for response in responses])
    return Batch(
        input_ids,
        position_ids,
        attention_mask,
        predictors=row * input_ids.shape[1] + column,
        targets=torch.tensor([token for response in responses for token in response]),
        responses=torch.repeat_interleave(counts),
    )
