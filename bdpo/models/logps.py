"""Summed log-probabilities of responses in their contexts: the forward that scoring and training share.

Because both call `pair_logps`, policy and reference agree to rounding at step 0. The output head runs
on response positions only and over a chunk of them at a time; its weights' gradient is summed up in
float32. `torch.nn.functional.linear_cross_entropy` is not used: of bfloat16 inputs it rounds each
token's loss to bfloat16 (torch 2.13).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache

from bdpo.models.architectures import has_plain_lm_head
from bdpo.models.branches import Branch, pack_branches, plain_branches
from bdpo.models.loading import warn_once
from bdpo.models.packing import Batch, SharedMask
from bdpo.models.row_layout import prefix_sharing_obstacle, row_layout
from bdpo.models.transformers_private import attention_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Logits that exist at one time: 128 MiB in float32.
CHUNK_ELEMENTS = 2**25

# How far two forwards of the same weights may be apart, in nats per root of a response's tokens: rounding
# depends on device, kernel and the shape of a batch, and the errors of tokens add up like a random walk.
# SmolLM2-135M in bfloat16 is 0.07 from itself in float32 (root mean square of 24 responses; largest 0.15).
ROUNDING = {"float32": 1e-3, "bfloat16": 0.5}

BOTH = ("chosen", "rejected")


def mean_states(hidden: torch.Tensor, response_of: torch.Tensor, responses: int) -> torch.Tensor:
    """(tokens, hidden size) -> (responses, hidden size), float32: the mean of the states of each response."""
    sums = hidden.new_zeros(responses, hidden.shape[1], dtype=torch.float32)
    sums.index_add_(0, response_of, hidden.float())
    return sums / response_of.bincount(minlength=responses)[:, None]


def pair_logps(
    model: Any, pairs: Batch, responses: Sequence[str] = BOTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected): summed log π(y | c(x)) in nats, float32, both shape (pairs,).

    `model` is a LogpsModel or an engine around one; the batch holds the groups `[c(x) | y_w | y_l]`, or with
    those of `responses` alone. The log-probs of a response that is not forwarded are NaN.
    """
    logps = model(pairs).view(-1, len(responses))
    found = dict(zip(responses, logps.unbind(1), strict=True))
    unknown = logps.new_full((len(logps),), torch.nan)
    return found.get("chosen", unknown), found.get("rejected", unknown)


class LogpsModel(nn.Module):
    """A causal language model of transformers whose outputs are log-probs of responses.

    The model keeps its parameters under its own names; its output head is replaced by a LogpsHead, with
    which the model still computes logits when it is called itself. Of models that scale or cap what the
    head computes (`has_plain_lm_head`) the own logits are used: those of the responses' part of a row.

    `one_forward`: a batch is one forward of the model, whatever its size. Workers that share a partitioned
    model gather its weights in every forward and wait for each other there, so all of them must run the
    same number of forwards, whereas the rows of their batches differ.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, one_forward: bool = False) -> None:
        super().__init__()
        self.model = model
        self.one_forward = one_forward
        self.chunked = has_plain_lm_head(model.config)
        self.layout = row_layout(model.config, max_length)
        self.tokens_forwarded = 0  # padding included, since the model was made
        if self.chunked:
            model.set_output_embeddings(LogpsHead(model.get_output_embeddings()))
        if why := prefix_sharing_obstacle(model.config, max_length):
            warn_once(f"a row for each response instead of one for both: {why}")

    def forward(self, batch: Batch, means: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Summed log π(response | context), nats, float32, shape (responses of all groups,).

        `batch` is on the host, packed by `layout`.
        With `means` also the mean state of each response, see `bdpo.method.ches`, (responses, hidden size);
        not a number where the model's hidden states are not known.
        """
        responses = int(batch.responses[-1]) + 1  # on the host, or it would wait for the device
        self.tokens_forwarded += batch.input_ids.numel()
        if self.chunked:
            batch = batch.to(self.model.device)
            hidden = self.model.base_model(**self._inputs(batch)).last_hidden_state.flatten(0, 1)
            hidden = hidden[batch.logit_positions]
            token_logps = self.model.get_output_embeddings()(hidden, batch.targets)
        else:
            token_logps = self._by_own_logits(batch)
            batch = batch.to(self.model.device)
        logps = token_logps.new_zeros(responses).index_add(0, batch.responses, token_logps)
        if not means:
            return logps
        if not self.chunked:
            return logps, logps.new_full((responses, 1), torch.nan)
        return logps, mean_states(hidden, batch.responses, responses)

    def branch_logps(self, context: Sequence[int], branches: Sequence[Branch]) -> torch.Tensor:
        """Summed log-probs of the scored tokens of each branch, nats, float32, shape (branches,)."""
        shared = self.layout.shared and attention_of_config(self.model.config) == "sdpa"
        if shared:
            batch = pack_branches(branches, self.model.config.hidden_size)
            context = context[: max(branch.start for branch in branches)]
            self.tokens_forwarded += len(context)
        else:
            batch = plain_branches(context, branches)
        self.tokens_forwarded += batch.input_ids.numel()
        if self.chunked:
            batch = batch.to(self.model.device)
            remembered = self._remembered(context, len(batch.input_ids)) if shared else {}
            inputs = {**self._inputs(batch), **remembered}
            hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)
            logps = self.model.get_output_embeddings()(hidden[batch.logit_positions], batch.targets)
        else:
            logps = self._by_own_logits(batch)
            batch = batch.to(self.model.device)
        return logps.new_zeros(len(branches)).index_add(0, batch.responses, logps)

    def _remembered(self, context: Sequence[int], rows: int) -> Mapping[str, Any]:
        """Inputs by which each of so many rows sees the keys and values of the context, forwarded once."""
        cache = DynamicCache()  # without the config, so that no sliding layer forgets: the window is longer
        ids = torch.tensor([context], device=self.model.device)
        self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache, "use_cache": True}

    def target_logps(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probs of the tokens that a row ends with, (targets,), from embeddings of all its tokens.

        `embeddings`, those of `targets` included, has the shape (1, tokens, hidden size); it gets gradients.
        """
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "use_cache": False}
        ends = slice(-len(targets) - 1, -1)
        if self.chunked:
            hidden = self.model.base_model(**inputs).last_hidden_state[0, ends]
            logps: torch.Tensor = self.model.get_output_embeddings()(hidden, targets)
            return logps
        return _picked(self.model(**inputs).logits[0, ends].float(), targets)

    def _by_own_logits(self, batch: Batch) -> torch.Tensor:
        """Log-probs of the targets; as many rows at a time as have a chunk of logits, one at least.

        Logits begin where the first response is predicted, if the model can leave out those before. Where
        a backward follows all logits are kept for it anyway, so all rows are one chunk.
        """
        rows, width = batch.input_ids.shape
        kept, mask = width, batch.attention_mask
        assert isinstance(mask, torch.Tensor), "the rows of these models are plain"  # noqa: S101
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            kept -= int((batch.logit_positions % width).min())
        chunk = max(1, CHUNK_ELEMENTS // (kept * self.model.config.get_text_config().vocab_size))
        logps = []
        for some in torch.arange(rows).split(rows if self.one_forward or torch.is_grad_enabled() else chunk):
            here = torch.isin(batch.logit_positions // width, some)
            row, column = batch.logit_positions[here] // width - some[0], batch.logit_positions[here] % width
            part = replace(
                batch,
                input_ids=batch.input_ids[some],
                attention_mask=mask[some],
                logit_positions=row * kept + column - (width - kept),
                targets=batch.targets[here],
            ).to(self.model.device)
            few = {"logits_to_keep": kept} if kept < width else {}
            logits = self.model(**self._inputs(part), **few).logits.flatten(0, 1)
            logps.append(_PickedLogps.apply(logits, part.logit_positions, part.targets))
        return torch.cat(logps)

    def _inputs(self, batch: Batch) -> Mapping[str, Any]:
        mask: Any = batch.attention_mask
        if isinstance(mask, SharedMask):
            mask = (
                mask.blocks() if attention_of_config(self.model.config) == "flex_attention" else mask.dense()
            )
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "use_cache": False}
        return inputs if batch.position_ids is None else inputs | {"position_ids": batch.position_ids}


class LogpsHead(nn.Module):
    """An output head that computes log π(target) of hidden states, chunk by chunk.

    It holds the parameters of the head it replaces, tied or not. Being one module call, it lets ZeRO-3
    gather a partitioned weight once for all chunks.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs of `targets`, (tokens,) float32, of `hidden` (tokens, width); logits without targets."""
        hidden = hidden.to(self.weight.dtype)  # state-space models keep their residual stream in float32
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        return _TargetLogps.apply(hidden, self.weight, self.bias, targets)


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden Wᵀ + b)[target]; logits live one chunk at a time, in backward too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        logps = torch.empty(len(targets), device=hidden.device)
        for chunk in _chunks(len(targets), len(weight)):
            logps[chunk] = _picked(F.linear(hidden[chunk], weight, bias).float(), targets[chunk])
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for chunk in _chunks(len(targets), len(weight)):
            logits = F.linear(hidden[chunk], weight, bias).float()
            grad_logits = _grad_of_picked(logits, targets[chunk], grad[chunk]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[chunk]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return grad_hidden, _like(grad_weight, weight), _like(grad_bias, bias), None


class _PickedLogps(torch.autograd.Function):
    """log softmax(logits[row])[target], as plain rows have it: no row twice. Float32 a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, rows, targets)
        logps = torch.empty(len(targets), device=logits.device)
        for chunk in _chunks(len(targets), logits.shape[1]):
            logps[chunk] = _picked(logits[rows[chunk]].float(), targets[chunk])
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, rows, targets = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for chunk in _chunks(len(targets), logits.shape[1]):
            of_chunk = _grad_of_picked(logits[rows[chunk]].float(), targets[chunk], grad[chunk])
            grad_logits[rows[chunk]] = of_chunk.to(logits.dtype)
        return grad_logits, None, None


def _picked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(z)[t] = z[t] - log Σ exp(z)."""
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _grad_of_picked(logits: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """d log softmax(z)[t] / dz = onehot(t) - softmax(z), in the place of the logits."""
    grad_logits = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_().mul_(-grad[:, None])
    return grad_logits.scatter_add_(1, targets[:, None], grad[:, None])


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _like(grad: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)
