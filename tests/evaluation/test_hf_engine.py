from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bdpo.errors import UserError
from bdpo.evaluation.engines.base import Answer, Sampling
from bdpo.evaluation.engines.hf import generate
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer

SPECIAL = ["<pad>", "<unk>", "<user>", "<bot>", "<end>"]

WORDS = "how do i bake a cake please tell me the way to paint one red door and then close it"

VOCAB = {token: i for i, token in enumerate([*SPECIAL, *WORDS.split()])}

TOKENS = list(VOCAB)

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)

NEW_TOKENS = 12


def word_chat(template: str = TEMPLATE, **special: str | None) -> ChatTokenizer:
    words = Tokenizer(WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=SPECIAL, **named)
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform, so that no two logits tie
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


PROMPTS = [
    user("bake"),
    user("how do i bake a cake please tell me the way to paint one red door"),
    [*user("close it"), {"role": "assistant", "content": "the red door"}, *user("and then")],
    user("tell me"),
]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def naive_ids(model: Qwen2ForCausalLM, ids: list[int], stops: set[int]) -> list[int]:
    """One prompt, no padding, no cache: the argmax, again and again."""
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        with torch.no_grad():
            following = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if following in stops:
            break
        answer.append(following)
    return answer


def naive_answers(model: Qwen2ForCausalLM, chat: ChatTokenizer, stops: set[int]) -> list[str]:
    answers = [naive_ids(model, chat.prompt_ids(prompt), stops) for prompt in PROMPTS]
    return [" ".join(TOKENS[i] for i in ids if TOKENS[i] not in SPECIAL) for ids in answers]


def test_a_batch_gives_what_naive_greedy_decoding_gives_one_by_one(model: Qwen2ForCausalLM) -> None:
    chat = word_chat()
    answers = texts(generate(model, chat, PROMPTS, NEW_TOKENS))
    assert answers == naive_answers(model, chat, {VOCAB["<end>"]})
    assert len(set(answers)) == len(PROMPTS)
    assert [generate(model, chat, [prompt], NEW_TOKENS)[0].text for prompt in PROMPTS] == answers


def test_the_generation_config_that_a_model_ships_changes_nothing(model: Qwen2ForCausalLM) -> None:
    chat = word_chat()
    plain = generate(model, chat, PROMPTS, NEW_TOKENS)
    shipped = model.generation_config
    shipped.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, max_length=3
    )
    assert generate(model, chat, PROMPTS, NEW_TOKENS) == plain
    assert model.generation_config is shipped


def test_without_a_pad_token_the_answers_are_the_same(model: Qwen2ForCausalLM) -> None:
    with_pad = generate(model, word_chat(), PROMPTS, NEW_TOKENS)
    assert generate(model, word_chat(pad_token=None), PROMPTS, NEW_TOKENS) == with_pad


def third_token(model: Qwen2ForCausalLM, chat: ChatTokenizer) -> int:
    """What the model says third in answer to the first prompt (and neither before, else use another)."""
    ids = naive_ids(model, chat.prompt_ids(PROMPTS[0]), set())
    return next(i for n, i in enumerate(ids) if n >= 2 and i not in ids[:n])


@pytest.mark.parametrize("as_list", [False, True])
def test_generation_stops_at_the_models_own_eos(model: Qwen2ForCausalLM, as_list: bool) -> None:
    chat = word_chat()
    stop = third_token(model, chat)
    model.generation_config.eos_token_id = [stop, VOCAB["<user>"]] if as_list else stop
    stops = {stop, VOCAB["<end>"]} | ({VOCAB["<user>"]} if as_list else set())
    answers = texts(generate(model, chat, PROMPTS, NEW_TOKENS))
    assert answers == naive_answers(model, chat, stops)
    assert answers != naive_answers(model, chat, {VOCAB["<end>"]})


def test_generation_stops_at_the_templates_end_of_turn(model: Qwen2ForCausalLM) -> None:
    stop = third_token(model, word_chat())
    chat = word_chat(TEMPLATE.replace("<end>", TOKENS[stop]), eos_token=TOKENS[stop])
    assert chat.end_of_turn_id == stop
    assert texts(generate(model, chat, PROMPTS, NEW_TOKENS)) == naive_answers(model, chat, {stop})


def test_a_prompt_that_leaves_too_few_positions_is_refused_without_its_text(model: Qwen2ForCausalLM) -> None:
    chat = word_chat()
    words = "door " * 10
    length = len(chat.prompt_ids(user(words)))
    assert generate(model, chat, [user(words)], 64 - length)
    with pytest.raises(
        UserError, match=f"{length} tokens.*max_new_tokens={65 - length}.*64 positions"
    ) as error:
        generate(model, chat, [user("bake"), user(words)], 65 - length)
    assert "door" not in str(error.value)


def test_no_prompts_no_answers(model: Qwen2ForCausalLM) -> None:
    assert generate(model, word_chat(), [], NEW_TOKENS) == []


def test_a_prefill_is_gone_on_with_and_no_part_of_the_answer(model: Qwen2ForCausalLM) -> None:
    chat = word_chat()
    prefills = [[VOCAB["red"], VOCAB["door"]], [], [VOCAB["cake"]], []]
    answers = generate(model, chat, PROMPTS, NEW_TOKENS, prefills=prefills)
    for prompt, prefill, answer in zip(PROMPTS, prefills, answers, strict=True):
        ids = naive_ids(model, [*chat.prompt_ids(prompt), *prefill], {VOCAB["<end>"]})
        assert answer.text == " ".join(TOKENS[i] for i in ids if TOKENS[i] not in SPECIAL)
    assert answers[0] != generate(model, chat, PROMPTS, NEW_TOKENS)[0]


def test_a_sample_depends_on_seed_and_prompt_but_not_on_the_batch(model: Qwen2ForCausalLM) -> None:
    chat = word_chat()
    sampled = generate(model, chat, PROMPTS, NEW_TOKENS, sampling=Sampling(2.0, seed=1))
    one_by_one = [
        generate(model, chat, [prompt], NEW_TOKENS, sampling=Sampling(2.0, seed=1))[0] for prompt in PROMPTS
    ]
    turned_round = generate(model, chat, PROMPTS[::-1], NEW_TOKENS, sampling=Sampling(2.0, seed=1))[::-1]
    assert sampled == one_by_one == turned_round
    assert sampled != generate(model, chat, PROMPTS, NEW_TOKENS, sampling=Sampling(2.0, seed=2))
    assert sampled != generate(model, chat, PROMPTS, NEW_TOKENS)


def test_samples_have_the_models_distribution(model: Qwen2ForCausalLM) -> None:
    """First tokens over many seeds against softmax(logits / T), by a chi-squared test."""
    from scipy.stats import chisquare

    chat, temperature, draws = word_chat(), 1.5, 600
    with torch.no_grad():
        logits = model(torch.tensor([chat.prompt_ids(PROMPTS[0])])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    words = [
        generate(model, chat, [PROMPTS[0]], 1, sampling=Sampling(temperature, seed))[0].text
        for seed in range(draws)
    ]
    likely = [i for i, token in enumerate(TOKENS) if expected[i] * draws > 5 and token not in SPECIAL]
    counts = [words.count(TOKENS[i]) for i in likely]
    shares = [float(expected[i]) * draws for i in likely]
    rest = draws - sum(counts), draws - sum(shares)
    assert len(likely) > 3
    assert chisquare([*counts, rest[0]], [*shares, rest[1]]).pvalue > 0.001


def test_an_answer_knows_how_it_ended(model: Qwen2ForCausalLM) -> None:
    chat = word_chat()
    stop = third_token(model, chat)
    model.generation_config.eos_token_id = stop
    try:
        first, *_ = generate(model, chat, PROMPTS[:1], NEW_TOKENS)
        assert (first.cut, first.finite, first.new_tokens) == (False, True, 3)
        [short] = generate(model, chat, PROMPTS[:1], 2)
        assert (short.cut, short.new_tokens) == (True, 2)
        assert first.text.startswith(short.text)
    finally:
        model.generation_config.eos_token_id = None


def test_logits_that_are_no_numbers_are_known(model: Qwen2ForCausalLM) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    assert not any(answer.finite for answer in generate(broken, word_chat(), PROMPTS, NEW_TOKENS))
