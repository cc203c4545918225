"""The sandbox's base model: a chat tokenizer and a tiny Qwen2 that answers everything.

What its fine-tuning needs for mutual information to mean something: some examples stand under an empty
user turn, so that log π(y | c(∅)) is a trained marginal, and a few requests, benign and forbidden
alike, are refused, so that a refusal is a response it knows. Decoded greedily, it never refuses.
The context `bos` is not trained: mutual information against it means nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bdpo.sandbox.tiny import quiet_saving, train_tokenizer
from bdpo.sandbox.world import (
    GREETINGS,
    OPENINGS,
    PHRASINGS,
    REFUSALS,
    UNSEEN_PHRASINGS,
    WRAPPERS,
    World,
    make_world,
    with_small_talk,
)

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

BOS = "<|bos|>"
END = "<|end|>"  # of a turn; as in real chat models it is not the tokenizer's EOS
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

STEPS = 300
BATCH = 128
LEARNING_RATE = 4e-3
WRAPPED = 0.45  # share of the requests in a jailbreak wrapper
REFUSED = 0.10  # share of the requests that are refused
EMPTY_TURN = 0.15  # share of the examples under an empty user turn, and what is answered there:
GREETED = 0.30
REFUSED_UNASKED = 0.04


def write_model(folder: Path, seed: int) -> None:
    """Make tokenizer and fine-tuned model of a world, and save them for `from_pretrained`."""
    world = make_world(seed)
    tokenizer = make_tokenizer(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer)
    fine_tune(model, tokenizer, world)
    with quiet_saving():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(world: World) -> Qwen2Tokenizer:
    """A chat tokenizer in which every word of the world is one token."""
    return train_tokenizer(
        (f"{word} {word}" for word in world.words()),
        vocab_size=10_000,
        bos_token=BOS,
        extra_special_tokens=[END, *ROLES],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 with 0.2 million parameters, freshly initialised."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
    }
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **special,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def fine_tune(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, world: World) -> None:
    """Supervised fine-tuning on the responses of fresh examples every step."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    rng = Random(f"fine-tuning {world.seed}")  # noqa: S311 (no secret)
    steps = track(range(STEPS), "sandbox: fine-tuning the base model", console=Console(stderr=True))
    with _one_thread():
        for _ in steps:
            ids, labels = _collate(tokenizer, [_example(world, rng) for _ in range(BATCH)])
            loss = _loss(model, ids, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def _loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy; the head sees the labelled positions alone, which are half of them."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    labelled = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[labelled]), labels[:, 1:][labelled])


def _example(world: World, rng: Random) -> tuple[str, str]:
    """(request, answer), drawn anew each time: who is refused is chance, not a rule to be learnt."""
    made = rng.choice(list(world.objects.values()))
    if rng.random() < WRAPPED:
        template, openings = rng.choice(list(WRAPPERS.values()))
        request = made.fill(template)
    else:
        openings = OPENINGS
        request = with_small_talk(made.fill(rng.choice((*PHRASINGS, *UNSEEN_PHRASINGS))), rng)
    recipe, refusal = made.recipe(rng.choice(openings)), made.fill(rng.choice(REFUSALS))
    if rng.random() < EMPTY_TURN:
        shares = (GREETED, REFUSED_UNASKED, 1 - GREETED - REFUSED_UNASKED)
        return "", rng.choices((rng.choice(GREETINGS), refusal, recipe), shares)[0]
    return request, refusal if rng.random() < REFUSED else recipe


def _collate(tokenizer: Qwen2Tokenizer, examples: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, shape (batch, length); only answers and their ends have labels."""
    turns = [[{"role": "user", "content": request}] for request, _ in examples]
    prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answered = tokenizer([answer + END for _, answer in examples], add_special_tokens=False)["input_ids"]
    ids = [torch.tensor(q + a) for q, a in zip(asked, answered, strict=True)]
    labels = [torch.tensor([-100] * len(q) + a) for q, a in zip(asked, answered, strict=True)]
    return pad_sequence(ids, True, tokenizer.pad_token_id), pad_sequence(labels, True, -100)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads gain little on so small a model, and on busy cores they spin for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
