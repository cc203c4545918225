"""The reference pass at 7B in bfloat16: tokens per second, MFU and memory of each path; drift from float32.

Every path answers the same four terms of the same pairs. A real token is one that those cannot do without
(each prompt once, each response twice), whatever a path forwards; MFU is 2N a real token. Left out: reading,
tokenising and writing, which `training` has in its scoring.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from bdpo.config import ModelConfig
from bdpo.models.attention import why_not_flex
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout
from bdpo.models.tokenizer import EncodedPair
from bdpo.scoring.reference import reference_logps
from benchmarks.common import EMPTY_TURN, MAX_LENGTH
from benchmarks.gpu.record import (
    NotMeasured,
    Row,
    mfu,
    not_measured,
    shown,
    verdict,
)
from benchmarks.gpu.setup import (
    Clock,
    Setup,
    model_folder,
    multiplying_parameters,
    peak_memory,
    profiled,
    random_model,
)

FLEX, SDPA, PLAIN = "shared rows, FlexAttention", "shared rows, SDPA", "plain rows"
VLLM, DRIFT = "vLLM prompt_logprobs", "drift from float32"
CASES = (FLEX, SDPA, PLAIN, DRIFT, VLLM)
BUDGETS = {FLEX: (8192, 16384, 32768, 65536), SDPA: (8192, 16384, 32768, 65536), PLAIN: (16384, 32768)}
EMPTY = list(range(2, 2 + EMPTY_TURN))
PASSES = 2


def measure(case: str, setup: Setup) -> Iterator[Row]:
    """The rows of a case: one for each budget of tokens, where it has one."""
    if case == DRIFT:
        yield drift(setup)
    elif case == VLLM:
        yield vllm_pass(setup)
    else:
        yield from paths(case, setup)


def paths(case: str, setup: Setup) -> Iterator[Row]:
    """Our own forward at each budget. On the CPU FlexAttention is SDPA, as in `bdpo.models.attention`."""
    shape, dtype, flex = setup.shape("7b"), torch.bfloat16, case == FLEX and not setup.smoke
    why = why_not_flex(shape, dtype, setup.device, MAX_LENGTH) if flex else None
    attention = "flex_attention" if flex else "sdpa"
    model = LogpsModel(random_model(shape, dtype, setup.device, attention), MAX_LENGTH).eval()
    model.layout = RowLayout(shape.hidden_size, shared=case != PLAIN)
    pairs = PrefixGroups.of(setup.pairs(16 if setup.smoke else 512))
    for budget in BUDGETS[case]:
        timed = timed_passes(setup, model, pairs, budget)
        yield {"tokens_per_batch": budget, "attention": attention, "auto_refuses_flex": why, **timed}
    profiled(setup, f"scoring-{case}", lambda: reference_logps(model, pairs, EMPTY, BUDGETS[case][-1]))


def timed_passes(setup: Setup, model: LogpsModel, pairs: PrefixGroups, budget: int) -> Row:
    """A pass over some pairs to warm up, `PASSES` over all; `halved` is how many batches did not fit."""
    reference_logps(model, pairs[range(len(pairs) // 8)], EMPTY, budget)
    if not setup.smoke:
        torch.cuda.reset_peak_memory_stats()
    begun, ended = [], []
    hooks = [
        model.register_forward_pre_hook(lambda *_: begun.append(1)),
        model.register_forward_hook(lambda *_: ended.append(1)),
    ]
    forwarded, clock = model.tokens_forwarded, Clock(setup.device)
    clock.mark()
    for _ in range(PASSES):
        reference_logps(model, pairs, EMPTY, budget)
        clock.mark()
    for hook in hooks:
        hook.remove()
    padded = (model.tokens_forwarded - forwarded) / PASSES / real_tokens(pairs)
    speed = speed_of(setup, pairs, clock.seconds())
    return speed | peak_memory(setup.device) | {"padded": padded, "halved": len(begun) - len(ended)}


def speed_of(setup: Setup, pairs: PrefixGroups, seconds: list[float]) -> Row:
    """Real tokens per second and MFU of the best of some passes."""
    tokens, best, weights = real_tokens(pairs), min(seconds), multiplying_parameters(setup.shape("7b"))
    return {
        "N": weights,
        "pairs": len(pairs),
        "real_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / best,
        "mfu": mfu(setup.machine, 2 * weights * tokens, best),
    }


def real_tokens(pairs: PrefixGroups) -> int:
    """As `bdpo.scoring.scores.real_tokens` counts them."""
    return int((pairs.lengths * [1, 2, 2]).sum())


def vllm_pass(setup: Setup) -> Row:
    """The same terms as log-probs of prompts, with the engine settings of the evaluation.

    Raises:
        NotMeasured: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise NotMeasured("vLLM is not installed")
    from vllm import LLM, SamplingParams

    from bdpo.evaluation.engines.vllm import engine_settings

    folder = model_folder(setup, "7b")
    engine = LLM(**engine_settings(ModelConfig(name_or_path=str(folder)), MAX_LENGTH + 1, 1))
    pairs, sampling = setup.pairs(512), SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)

    def score(pairs: list[EncodedPair]) -> None:
        contexts = [
            (context, r) for p in pairs for context in (p.prompt, EMPTY) for r in (p.chosen, p.rejected)
        ]
        engine.generate([{"prompt_token_ids": c + r} for c, r in contexts], sampling, use_tqdm=False)

    score(pairs[:64])
    clock = Clock(torch.device("cpu"))  # the engine is a process of its own: the wall clock
    clock.mark()
    for _ in range(PASSES):
        score(pairs)
        clock.mark()
    return speed_of(setup, PrefixGroups.of(pairs), clock.seconds()) | {
        "peak_gib": None,
        "padded": None,
        "halved": 0,
    }


def drift(setup: Setup) -> Row:
    """Log-probs and MI in bfloat16 minus those in float32 with the same weights, nats a token, at 1.5B."""
    low = random_model(setup.shape("1.5b"), torch.bfloat16, setup.device)
    models = [LogpsModel(model, MAX_LENGTH).eval() for model in (copy.deepcopy(low).float(), low)]
    pairs = PrefixGroups.of(setup.pairs(8 if setup.smoke else 128))
    exact, rounded = (reference_logps(model, pairs, EMPTY, 16384)[0] for model in models)
    tokens = dict(zip(("chosen", "rejected"), torch.from_numpy(pairs.lengths[:, 1:]).unbind(1), strict=True))

    def per_token(logps: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        return torch.cat([logps[f"{kind}_{side}_logps"] / tokens[side] for side in tokens])

    off = {kind: per_token(rounded, kind) - per_token(exact, kind) for kind in ("ref", "uncond")}
    mi = per_token(exact, "ref") - per_token(exact, "uncond")
    return {
        "logps_off": _size(torch.cat(list(off.values()))),
        "mi_off": _size(off["ref"] - off["uncond"]),
        "mi_size": float(mi.abs().mean()),
    }


def _size(values: torch.Tensor) -> list[float]:
    """Mean, mean size, largest size."""
    return [float(v) for v in (values.mean(), values.abs().mean(), values.abs().max())]


def table(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    """For people: the speed of each path, then the drift."""
    speeds = [row for row in rows if "tokens_per_second" in row]
    lines = [
        "| path | tokens a batch | real tokens/s | MFU, % | peak GiB | padded/real | halved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in speeds:
        lines.append(
            f"| {row['case']} | {row.get('tokens_per_batch', '–')} | {row['tokens_per_second']:,.0f} "
            f"| {shown(row['mfu'])} | {shown(row['peak_gib'])} | {shown(row['padded'], '.3f')} "
            f"| {row['halved']} |"
        )
    for row in (row for row in rows if row["case"] == DRIFT and "mi_off" in row):
        cells = [", ".join(f"{v:.1e}" for v in row[of]) for of in ("logps_off", "mi_off")]
        lines += ["", "| bfloat16 − float32, nats/token: mean, mean size, max | of MI | mean size of MI |"]
        lines += ["|---|---|---|", f"| {cells[0]} | {cells[1]} | {row['mi_size']:.1e} |"]
    weights = next((row["N"] / 1e9 for row in speeds), None)
    lines += [
        "",
        f"MFU: 2N a real token, N = {shown(weights, '.2f')} billion (all but the input embedding), of "
        f"{machine['peak_tflops']} TFLOP/s. Padded: what was forwarded. Halved: batches that did not fit.",
        "",
    ]
    refusals = {row["auto_refuses_flex"] for row in speeds if row["case"] == FLEX} - {None}
    lines += [f"- attn_implementation=auto takes SDPA here, for FlexAttention {why}" for why in refusals]
    best = max((row["mfu"] for row in speeds if row["case"] != VLLM and row["mfu"]), default=None)
    return [*lines, verdict("scoring MFU, %", best, 55, at_least=True), *not_measured(rows)]
