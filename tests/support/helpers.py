"""Small real things that tests share: models, pairs, a config that runs in seconds."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bdpo.config import Config, parse_config
from bdpo.models.logps import LogpsModel, pair_logps
from bdpo.models.packing import PrefixGroups
from bdpo.models.tokenizer import ChatTokenizer, EncodedPair

VOCABULARY = 262  # the byte tokenizer's

# For the source of a process: the most memory it had, in GiB. getrusage would count its parent's as well.
PEAK = """
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
"""


def tiny_qwen2(seed: int = 0, tied: bool = False) -> Qwen2ForCausalLM:
    """Two layers, 32 wide, random: wide enough that every weight matters, RoPE and grouped heads."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # far from uniform predictions
    )
    return Qwen2ForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """Absolute positions, tied head, dropout on by default."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    return GPT2LMHeadModel(config).eval()


def save_model(folder: Path, chat: ChatTokenizer, seed: int = 0, tied: bool = False) -> Path:
    """A model folder as from the hub: weights, tokenizer, chat template."""
    tiny_qwen2(seed, tied).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


def encoded_pairs(shapes: list[tuple[int, int, int]], seed: int = 0) -> list[EncodedPair]:
    """Ids of the given numbers of prompt, chosen and rejected tokens."""
    rng = random.Random(seed)
    return [EncodedPair(*([rng.randrange(VOCABULARY) for _ in range(n)] for n in shape)) for shape in shapes]


def logps_of(model: LogpsModel, pairs: list[EncodedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected) of `pair_logps`."""
    return pair_logps(model, model.layout.pack(PrefixGroups.of(pairs)))


def groups_in_lists(groups: PrefixGroups) -> list[list[list[int]]]:
    """[context, *responses] of each group."""
    return [
        [groups.tokens[start : start + length].tolist() for start, length in zip(*parts, strict=True)]
        for parts in zip(groups.starts, groups.lengths, strict=True)
    ]


def naive_logps(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Of (context, response) ids: one sequence at a time, in float64, by the model's own logits."""
    model, sums = copy.deepcopy(model).double(), []
    model.set_experts_implementation("eager")  # grouped products know no float64
    for context, response in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([context + response])).logits[0].log_softmax(-1)
        start = len(context) - 1
        sums.append(sum(log_probs[start + k, token].item() for k, token in enumerate(response)))
    return torch.tensor(sums, dtype=torch.float64)


def invented_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Harmless pairs of every length, half of them labelled unsafe."""
    rng = random.Random(seed)
    words = ["amber", "basil", "cedar", "delta", "ember", "fern"]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [
        {
            "prompt": f"{i} {text(1, 4)}?",
            "chosen": f"yes {text(1, 5)}",
            "rejected": f"no {text(1, 5)}",
            "group": ("safe", "unsafe")[i % 2],
            "chosen_safe": True,
            "rejected_safe": i % 2 == 0,
        }
        for i in range(count)
    ]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tiny_config(run_dir: Path, model: Path, data: Path, **changes: dict[str, Any]) -> Config:
    """A config of every stage on CPU; `changes` are laid over its sections."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"path": str(data), "max_length": 128, "max_prompt_length": 96},
        "score": {"tokens_per_batch": 512, "shard_rows": 8, "gpus_per_worker": 0},
        "method": {},
        "train": {
            "gpus_per_worker": 0,
            "global_batch_size": 8,
            "tokens_per_micro_batch": 512,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "gradient_checkpointing": False,
        },
        "evaluate": {"max_new_tokens": 4, "gpus_per_worker": 0},
    }
    for section, keys in changes.items():
        values[section] = values[section] | keys
    return parse_config(values, "test")
