"""Operations of a step of GCG with 64 candidates, beside a naive one that forwards each candidate alone.

    python -m benchmarks.gcg

Writes its section of benchmarks/RESULTS.md. A step is one gradient and the losses of 64 candidates. The naive
step forwards each candidate's sequence from its first token on and computes the logits of all its tokens, as
`model(input_ids).logits` does; the second naive one computes the logits of the target alone. The model has
the shape of SmolLM2-135M with one of its 30 layers and as much less of its vocabulary, and random weights:
operations do not depend on their values, and the share of the head stays what it is. All ways must give the
same losses.
"""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bdpo.evaluation.attacks.coordinate import candidate_losses, token_gradient
from bdpo.evaluation.attacks.requests import Request
from bdpo.evaluation.attacks.suffixes import SuffixedPrompt
from bdpo.models.logps import LogpsModel
from benchmarks.common import flops, write_section

CANDIDATES, SUFFIX, AFTER, TARGET = 64, 20, 5, 16
VOCABULARY = 1_536
CONTEXTS = (25, 51, 60, 100)
"""Tokens before the suffix: template and request. SmolLM2's template around a request of StrongReject has 56
in the median, of which 5 stand behind the suffix."""


def small_llama() -> LlamaForCausalLM:
    """A layer of SmolLM2-135M, and a 32nd of its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt_of(context: int) -> tuple[SuffixedPrompt, list[int], list[list[int]]]:
    """A prompt of random tokens, its suffix, and candidates with one token changed, at positions as drawn."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    request = Request("r", 1, "c", "", "")
    prompt = SuffixedPrompt(request, tokens(context), tokens(AFTER), tokens(TARGET), ("", ""))
    suffix, candidates = tokens(SUFFIX), []
    for _ in range(CANDIDATES):
        position = rng.randrange(SUFFIX)
        candidates.append([*suffix[:position], *tokens(1), *suffix[position + 1 :]])
    return prompt, suffix, candidates


@torch.no_grad()
def naive_losses(
    model: LlamaForCausalLM, prompt: SuffixedPrompt, candidates: list[list[int]], kept: int
) -> torch.Tensor:
    """All sequences in one batch, the logits of the last `kept` tokens (0: of all)."""
    rows = [[*prompt.before, *ids, *prompt.after, *prompt.target] for ids in candidates]
    logits = model(input_ids=torch.tensor(rows), use_cache=False, logits_to_keep=kept).logits
    log_probs = logits[:, -TARGET - 1 : -1].log_softmax(-1)
    targets = torch.tensor(prompt.target).expand(len(rows), -1)
    return -log_probs.gather(2, targets[..., None])[..., 0].mean(1)


def row(context: int) -> str:
    """Of one length of the context: operations of the three ways, in units of 10⁹."""
    model = small_llama()
    prompt, suffix, candidates = prompt_of(context)
    found: list[torch.Tensor] = []
    naive, _ = flops(model, lambda: found.append(naive_losses(model, prompt, candidates, 0)))
    few, _ = flops(model, lambda: found.append(naive_losses(model, prompt, candidates, TARGET + 1)))
    logps = LogpsModel(model, 2048)
    ours, _ = flops(
        model, lambda: found.append(candidate_losses(logps, prompt, suffix, candidates, 1_000_000))
    )
    for losses in found[1:]:
        torch.testing.assert_close(losses, found[0], atol=1e-3, rtol=1e-4)
    gradient, _ = flops(model, lambda: token_gradient(logps, prompt, suffix))  # the same in all ways
    step, one, other = ours + gradient, naive + gradient, few + gradient
    numbers = " | ".join(f"{count / 1e9:.0f}" for count in (gradient, step, one, other))
    return f"| {context} | {numbers} | **{step / one:.3f}** | {step / other:.3f} |"


def main() -> None:
    table = [
        f"{CANDIDATES} candidates that change one of {SUFFIX} suffix tokens, {AFTER} tokens behind it, a "
        f"target of {TARGET}. 10⁹ operations of a step with its gradient.",
        "",
        "| tokens before the suffix | gradient | ours | naive, all logits | naive, target's logits "
        "| ours / naive | ours / naive, target's logits |",
        "|---|---|---|---|---|---|---|",
        *map(row, CONTEXTS),
    ]
    write_section("GCG step", table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
