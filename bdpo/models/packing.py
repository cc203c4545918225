"""Responses behind their contexts -> rows of one padded shape in which every context is computed once.

A prefix group is a context and the responses that continue it, written as `[c | y_1 | y_2 ...]`: the
positions of each response restart at |c|, and a mask hides the responses from each other. A batch is a
grid of rows, see `bdpo.models.arrangement`; how a model is applied to it is in `bdpo.models.logps`.

A token is an element of an array here, never a Python object: a GPU forwards one in 20 to 100 microseconds,
and whatever the host does for it has to be far less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bdpo.models.arrangement import arrange

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class PrefixGroups:
    """Contexts and the responses that continue them, as parts of one array of token ids.

    `tokens` is int32 of any length; `starts` and `lengths` are int64, (groups, 1 + responses): where the
    context and each response of a group begin, and how many tokens they have. No part is empty.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, groups: Iterable[Sequence[Sequence[int]]]) -> PrefixGroups:
        """Groups of token ids in lists, each its context and then as many responses as the others have."""
        lists = [[np.asarray(part, np.int32) for part in group] for group in groups]
        lengths = np.array([[len(part) for part in group] for group in lists])
        return cls.in_a_row(np.concatenate([part for group in lists for part in group]), lengths)

    @classmethod
    def in_a_row(cls, tokens: np.ndarray, lengths: np.ndarray) -> PrefixGroups:
        """Groups that stand in `tokens` one after the other, each its context and then its responses."""
        ends = lengths.cumsum(dtype=np.int64).reshape(lengths.shape)
        return cls(tokens, ends - lengths, lengths.astype(np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> PrefixGroups:
        """Some of the groups; their tokens stay where they are."""
        return PrefixGroups(self.tokens, self.starts[indices], self.lengths[indices])

    def with_responses(self, numbers: Sequence[int]) -> PrefixGroups:
        """The groups with some of their responses, which are numbered from 0."""
        parts = [0, *(1 + number for number in numbers)]
        return PrefixGroups(self.tokens, self.starts[:, parts], self.lengths[:, parts])

    def tokens_in_order(self) -> np.ndarray:
        """Contexts and responses of all groups, one after the other, int32."""
        return self.tokens[_ranges(self.starts, self.lengths)]

    def apart(self) -> PrefixGroups:
        """Every response in a group of its own, behind its context."""

        def pairwise(parts: np.ndarray) -> np.ndarray:
            responses = parts[:, 1:]
            return np.stack([np.repeat(parts[:, 0], responses.shape[1]), responses.reshape(-1)], axis=1)

        return PrefixGroups(self.tokens, pairwise(self.starts), pairwise(self.lengths))

    def behind(self, context: Sequence[int]) -> PrefixGroups:
        """Every response in a group of its own, behind this context instead of its own."""
        tokens = np.concatenate([self.tokens, np.asarray(context, np.int32)])
        apart = self.apart()
        apart.starts[:, 0], apart.lengths[:, 0] = len(self.tokens), len(context)
        return PrefixGroups(tokens, apart.starts, apart.lengths)

    def common_context(self) -> np.ndarray:
        """The context that all groups have in common, int32; empty if they have none."""
        starts, lengths = self.starts[:, 0], self.lengths[:, 0]
        first = self.tokens[starts[0] : starts[0] + lengths[0]]
        same = (lengths == lengths[0]).all() and (
            self.tokens[_ranges(starts, lengths)].reshape(-1, lengths[0]) == first
        ).all()
        return first if same else first[:0]


@dataclass(frozen=True)
class SharedMask:
    """Who sees whom in shared rows: prefix group and response of each token, both int32, (rows, width).

    `response_of` is 0 in a context. The mask is made of them on the device that computes with it: it has the
    row's width times their size.
    """

    group_of: torch.Tensor
    response_of: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> SharedMask:
        """The same on another device."""
        parts = (part.to(device, non_blocking=non_blocking) for part in (self.group_of, self.response_of))
        return SharedMask(*parts)

    def pin_memory(self) -> SharedMask:
        """The same in memory that a GPU reads by itself."""
        return SharedMask(self.group_of.pin_memory(), self.response_of.pin_memory())

    def dense(self) -> torch.Tensor:
        """Bool, (rows, 1, width, width), True where a token sees another: for SDPA."""
        rows, width = (torch.arange(size, device=self.group_of.device) for size in self.group_of.shape)
        return self._sees()(rows[:, None, None, None], 0, width[:, None], width)

    def blocks(self) -> BlockMask:
        """The same for FlexAttention, which skips blocks of the grid where nobody sees anybody.

        A BlockMask cannot be moved, for it holds on to the tensors that its `mask_mod` looks into.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        rows, width = self.group_of.shape
        return create_block_mask(self._sees(), rows, None, width, width, device=self.group_of.device)

    def _sees(self) -> Callable[..., torch.Tensor]:
        """Whether a token sees another: a `mask_mod` of FlexAttention, a function of indices.

        A token sees what stands before it in its own group and is context or its own response. Padding
        stands last in its row, so that no other token sees it; it sees itself, because a softmax over
        nothing is not a number.
        """
        group_of, response_of = self.group_of, self.response_of

        def sees(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            same_group = group_of[row, query] == group_of[row, key]
            same_response = response_of[row, query] == response_of[row, key]
            return (key <= query) & same_group & (same_response | (response_of[row, key] == 0))

        return sees


@dataclass(frozen=True)
class Batch:
    """One forward pass; `targets` are the tokens of all responses of all groups, one after the other.

    `input_ids` (rows, width); `position_ids` the same, None where the model's own are right;
    `attention_mask` a SharedMask, or bool: (rows, 1, width, width) True where a token sees another, or
    (rows, width) True where there is a token. Shape (response tokens,): `logit_positions`, indices into
    rows x width of the hidden states that predict the `targets`, and `responses`, which response each
    belongs to.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | SharedMask
    logit_positions: torch.Tensor
    targets: torch.Tensor
    responses: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device; from pinned memory the host does not wait for it."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads by itself."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        parts = [getattr(self, field.name) for field in fields(self)]
        changed: list[Any] = [None if part is None else change(part) for part in parts]
        return Batch(*changed)


def pack(groups: PrefixGroups, hidden_size: int) -> Batch:
    """Shared rows: several groups a row; a context that all groups have in common is there once a row."""
    context = groups.common_context()
    common, lengths = len(context), groups.lengths
    if common:
        lengths = np.hstack([np.zeros_like(lengths[:, :1]), lengths[:, 1:]])
    sizes = lengths.sum(1)
    row, column = _places(arrange(sizes.tolist(), common, hidden_size), sizes)
    width = common + int((column + sizes).max())
    begins = common + column[:, None] + lengths.cumsum(1) - lengths  # the column of each part
    cells = _ranges(row[:, None] * width + begins, lengths)

    def grid(of_common: np.ndarray | int, of_cells: np.ndarray, dtype: type) -> torch.Tensor:
        values = np.zeros((row.max() + 1, width), dtype)  # padding stays 0
        values[:, :common] = of_common
        values.reshape(-1)[cells] = of_cells
        return torch.from_numpy(values)

    def of_responses(values: np.ndarray) -> np.ndarray:
        """(groups, 1 + responses) -> one value per cell, 0 in a context."""
        return np.repeat(np.hstack([np.zeros_like(values[:, :1]), values[:, 1:]]), lengths.reshape(-1))

    positions = of_responses(np.broadcast_to(groups.lengths[:, :1], lengths.shape)) + _ranges(0, lengths)
    numbers = np.repeat(np.arange(len(groups)) * (not common), sizes)
    # The column where a response starts is never 0 and differs from every other response's in the row, so
    # it serves as the response's number in the mask.
    mask = SharedMask(grid(0, numbers, np.int32), grid(0, of_responses(begins), np.int32))
    # The first token of a response is predicted at the context's last position, every other one at the
    # token before it. The responses share that last position: nothing is copied for them.
    context_ends = np.full_like(column, common) if common else begins[:, 1]
    return Batch(
        grid(context, groups.tokens[_ranges(groups.starts, lengths)], np.int64),
        grid(np.arange(common), positions, np.int64),
        mask,
        *_predicted(groups, (row * width)[:, None] + begins[:, 1:], (row * width + context_ends)[:, None]),
    )


def pack_plain(groups: PrefixGroups) -> Batch:
    """Plain rows: each response behind a context of its own, padded on the right."""
    rows = groups.apart()
    sizes = rows.lengths.sum(1)
    begins = np.arange(len(rows)) * sizes.max()
    cells = _ranges(begins, sizes)
    input_ids = np.zeros((len(rows), sizes.max()), np.int64)
    mask = np.zeros(input_ids.shape, bool)
    input_ids.reshape(-1)[cells] = rows.tokens[_ranges(rows.starts, rows.lengths)]
    mask.reshape(-1)[cells] = True
    responses = (begins + rows.lengths[:, 0])[:, None]
    predicted = _predicted(rows, responses, responses)
    return Batch(torch.from_numpy(input_ids), None, torch.from_numpy(mask), *predicted)


def _predicted(
    groups: PrefixGroups, begins: np.ndarray, context_ends: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logit_positions`, `targets` and `responses` of a Batch.

    `begins`, (groups, responses), are the cells of rows x width where the responses begin, `context_ends`,
    (groups, 1), those behind the last token of their contexts.
    """
    lengths = groups.lengths[:, 1:]
    counts = lengths.reshape(-1)
    before = _ranges(begins, lengths) - 1
    before[counts.cumsum() - counts] = np.broadcast_to(context_ends, lengths.shape).reshape(-1) - 1
    targets = groups.tokens[_ranges(groups.starts[:, 1:], lengths)].astype(np.int64)
    responses = np.repeat(np.arange(len(counts)), counts)
    return torch.from_numpy(before), torch.from_numpy(targets), torch.from_numpy(responses)


def _places(rows: Sequence[Sequence[int]], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, column behind a common context) where each group begins, int64, (groups,)."""
    order, members = np.concatenate(rows), np.array([len(row) for row in rows])
    row, column = np.empty_like(order), np.empty_like(order)
    row[order] = np.repeat(np.arange(len(rows)), members)
    before = sizes[order].cumsum() - sizes[order]
    column[order] = before - np.repeat(before[members.cumsum() - members], members)
    return row, column


def _ranges(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each part, as many as it is long, one part after the other."""
    lengths = lengths.reshape(-1)
    ends = lengths.cumsum()
    return np.arange(ends[-1]) + np.repeat(np.reshape(starts, -1) - (ends - lengths), lengths)
