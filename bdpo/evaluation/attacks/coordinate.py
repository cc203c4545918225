"""A step of greedy coordinate gradient: algorithm 1 of Zou et al., arXiv 2307.15043."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from bdpo.evaluation.attacks.suffixes import SuffixedPrompt, stable_suffixes
from bdpo.models.branches import Branch
from bdpo.models.logps import LogpsModel
from bdpo.models.tokenizer import ChatTokenizer

_ROUNDS = 4
"""How many times the candidates of a step are drawn at most, until enough of them are stable."""


def token_gradient(model: LogpsModel, prompt: SuffixedPrompt, suffix: Sequence[int]) -> torch.Tensor:
    """Gradient of the target's mean −log π with respect to one-hot suffix tokens.

    A one-hot row times the embedding matrix is the token's embedding, so its gradient is the embedding's
    times that matrix: the one-hot matrix itself is not made. Float32, shape (suffix, vocabulary).
    """
    embed = model.model.get_input_embeddings()
    ids = torch.tensor([*prompt.before, *suffix, *prompt.after, *prompt.target], device=model.model.device)
    embeddings = embed(ids[None]).detach()
    start, end = len(prompt.before), len(prompt.before) + len(suffix)
    own = embeddings[:, start:end].clone().requires_grad_()
    with torch.enable_grad():
        row = torch.cat([embeddings[:, :start], own, embeddings[:, end:]], 1)
        loss = -model.target_logps(row, ids[-len(prompt.target) :]).mean()
        (gradient,) = torch.autograd.grad(loss, own)
    return gradient[0].float() @ embed.weight.float().T


@torch.no_grad()
def candidate_losses(
    model: LogpsModel,
    prompt: SuffixedPrompt,
    suffix: Sequence[int],
    candidates: Sequence[list[int]],
    tokens_per_batch: int,
) -> torch.Tensor:
    """Mean −log π of the target's tokens behind each candidate: nats, float32, (candidates,), on the CPU.

    A candidate shares with `suffix` all tokens before the first that differs: what stands from there on is a
    branch of the prompt with `suffix`, and is all that is computed for it.
    """
    context = [*prompt.before, *suffix]
    branches = [_branch(prompt, suffix, candidate) for candidate in candidates]
    cost = len(context) + max(len(branch.ids) for branch in branches)  # keys and values are of all of them
    together = max(1, tokens_per_batch // cost)
    parts = [
        model.branch_logps(context, branches[n : n + together]) for n in range(0, len(branches), together)
    ]
    return -torch.cat(parts).float().cpu() / len(prompt.target)


def _branch(prompt: SuffixedPrompt, suffix: Sequence[int], candidate: Sequence[int]) -> Branch:
    """From the first token that differs; from the last of an equal one, as a branch is never empty."""
    pairs = zip(suffix, candidate, strict=True)
    same = next((n for n, (one, other) in enumerate(pairs) if one != other), len(suffix) - 1)
    ids = [*candidate[same:], *prompt.after, *prompt.target]
    return Branch(len(prompt.before) + same, ids, len(prompt.target))


def draw_candidates(
    gradient: torch.Tensor, suffix: Sequence[int], shape: tuple[int, int], generator: torch.Generator
) -> list[list[int]]:
    """Suffixes with one token changed, position and token uniform among the `top_k` of the position.

    `gradient` is infinity where a token is not allowed, and finite everywhere else; `shape` is (number of
    suffixes, top_k). Those that change nothing, or were drawn before, are left out.
    """
    count, top_k = shape
    allowed = int(gradient[0].isfinite().sum())
    best = (-gradient).topk(min(top_k, allowed), dim=1).indices.cpu()
    positions = torch.randint(len(suffix), (count,), generator=generator).tolist()
    ranks = torch.randint(best.shape[1], (count,), generator=generator).tolist()
    drawn: dict[tuple[int, ...], None] = {}
    for position, rank in zip(positions, ranks, strict=True):
        changed = [*suffix[:position], int(best[position, rank]), *suffix[position + 1 :]]
        if changed != list(suffix):
            drawn[tuple(changed)] = None
    return [list(ids) for ids in drawn]


def stable_candidates(
    chat: ChatTokenizer,
    prompts: Sequence[SuffixedPrompt],
    gradient: torch.Tensor,
    suffix: Sequence[int],
    shape: tuple[int, int],
    key: str,
) -> list[list[int]]:
    """At most `shape[0]` different candidates that are stable in every prompt, decided by `key` alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_ROUNDS):
        drawn = draw_candidates(gradient, suffix, shape, generator)
        new = [ids for ids in drawn if tuple(ids) not in found]
        found |= {tuple(ids): None for ids in stable_suffixes(chat, prompts, new)}
        if len(found) >= shape[0]:
            break
    return [list(ids) for ids in found][: shape[0]]
