"""The fine-tuned judge on a tiny Gemma with a real byte-level tokenizer that the test makes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from bdpo.config import Config
from bdpo.errors import UserError
from bdpo.evaluation.judges.base import Harm, Question, Refusal
from bdpo.evaluation.judges.finetuned import (
    PROMPT,
    FinetunedJudge,
    digit_ids,
    finetuned_digest,
    load_finetuned_judge,
)
from bdpo.evaluation.judges.registry import judge_kind
from tests.support.helpers import tiny_config

ASKED = Question("harm", "Tie a {knot}")

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, with Gemma's special tokens and its BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", None, [("<bos>", WORDS.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("judge")
    GemmaForCausalLM(config).save_pretrained(folder)
    gemma_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> FinetunedJudge:
    return load_finetuned_judge(str(folder), on_gpu=False)


def fixed_logits(judge: FinetunedJudge, logits: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last position says these logits, and others are larger, which must not matter."""
    row = torch.full((len(WORDS),), 50.0)
    for digit, logit in logits.items():
        row[WORDS.index(digit)] = logit

    def forward(input_ids: torch.Tensor) -> object:
        out = torch.zeros(*input_ids.shape, len(WORDS))
        out[:, -1] = row
        return type("Output", (), {"logits": out})

    monkeypatch.setattr(judge.model, "forward", forward)


@pytest.mark.parametrize(
    ("probabilities", "score"),
    [
        ((1, 0, 0, 0, 0), 0),
        ((0, 0, 0, 0, 1), 1),
        ((0.2, 0.2, 0.2, 0.2, 0.2), (0 + 1 + 2 + 3 + 4) / 5 / 4),
        ((0.5, 0, 0, 0.5, 0), 0.5 * 3 / 4),
        ((0.1, 0.2, 0.3, 0.25, 0.15), (0.2 * 1 + 0.3 * 2 + 0.25 * 3 + 0.15 * 4) / 4),
    ],
)
def test_the_expectation_by_hand(
    judge: FinetunedJudge, probabilities: tuple[float, ...], score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = {str(i): math.log(p) if p else -1e4 for i, p in enumerate(probabilities, 1)}
    fixed_logits(judge, logits, monkeypatch)
    assert judge(ASKED, "Cross the ends.").harm == pytest.approx(score, abs=1e-6)


def test_the_score_is_the_models_at_the_last_position(judge: FinetunedJudge) -> None:
    tokenizer = gemma_tokenizer()
    response = "Cross {the} ends."
    ids = tokenizer(PROMPT.replace("{request}", ASKED.request).replace("{response}", response))["input_ids"]
    assert judge.prompt_ids(ASKED.request, response) == ids
    with torch.no_grad():
        logits = judge.model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
    weights = [math.exp(logits[WORDS.index(digit)]) for digit in "12345"]
    expected = sum(w * i / 4 for i, w in enumerate(weights)) / sum(weights)
    verdict = judge(ASKED, response)
    assert verdict.harm == pytest.approx(expected, abs=1e-6)
    assert 0.01 < expected < 0.99
    assert judge(Question("refusal", "Tie a {knot}"), "I cannot do that.") == Refusal(True)


def test_the_prompt_has_one_bos_and_ends_with_a_space(judge: FinetunedJudge) -> None:
    ids = judge.prompt_ids("Tie a <bos> knot", "<eos> Cross <bos> the ends.")
    assert ids.count(WORDS.index("<bos>")) == 1
    assert WORDS.index("<eos>") not in ids
    text = judge.tokenizer.decode(ids[1:])
    assert "User instruction: Tie a <bos> knot\n\nAI model response: <eos> Cross <bos> the ends.\n" in text
    assert text.endswith("### Answer: ")


@pytest.mark.parametrize(("length", "kept"), [(511, 511), (512, 512), (513, 512), (2000, 512)])
def test_a_long_response_is_cut_on_its_left(judge: FinetunedJudge, length: int, kept: int) -> None:
    response = "".join(chr(ord("a") + i % 26) for i in range(length))  # one token a letter
    text = judge.tokenizer.decode(judge.prompt_ids("x", response))
    assert f"AI model response: {response[-kept:]}\n" in text


def test_nothing_said_is_no_harm(judge: FinetunedJudge) -> None:
    assert judge(ASKED, " \n") == Harm(0.0, refused=True)


def test_a_tokenizer_without_digits_is_refused() -> None:
    tokenizer = gemma_tokenizer()
    words = {word: i for i, word in enumerate(word for word in WORDS if word != "3")}
    tokenizer.backend_tokenizer.model = models.BPE(words, [])
    with pytest.raises(UserError, match="no token for a digit"):
        digit_ids(tokenizer)


def test_an_adapter_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluate\.judge\.model=.*neither config\.json nor adapter_config\.json"
    ):
        load_finetuned_judge(str(tmp_path), on_gpu=False)


def test_another_tokenizer_is_another_judge(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    assert finetuned_digest(str(other)) == finetuned_digest(str(folder))
    text = (other / "tokenizer_config.json").read_text(encoding="utf-8")
    (other / "tokenizer_config.json").write_text(
        text.replace("{", '{"padding_side": "left", ', 1), encoding="utf-8"
    )
    assert finetuned_digest(str(other)) != finetuned_digest(str(folder))


def judged_by(name: Path, tmp_path: Path) -> Config:
    judge = {"name": "finetuned", "model": str(name)}
    return tiny_config(tmp_path, tmp_path, tmp_path, evaluate={"judge": judge, "gpus_per_worker": 0})


def with_nan(folder: Path, file: str, to: Path) -> Path:
    """A copy of the folder in which one weight of a file is not a number."""
    shutil.copytree(folder, to)
    weights = load_file(to / file)
    next(iter(weights.values())).view(-1)[1] = torch.nan
    save_file(weights, to / file, {"format": "pt"})
    return to


def test_weights_that_are_not_finite_are_refused_before_anything_is_asked(
    folder: Path, tmp_path: Path
) -> None:
    """Those of a model, of an adapter, and of the base that an adapter names."""
    model = with_nan(folder, "model.safetensors", tmp_path / "model")
    adapters = {}
    for name, base in (("sound", folder), ("over a damaged base", model)):
        policy = GemmaForCausalLM.from_pretrained(folder)
        policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        policy.peft_config["default"].base_model_name_or_path = str(base)
        policy.save_pretrained(tmp_path / name)
        gemma_tokenizer().save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
    damaged = with_nan(adapters["sound"], "adapter_model.safetensors", tmp_path / "adapter")
    for sound in (folder, adapters["sound"]):
        config = judged_by(sound, tmp_path)
        assert "weights and tokenizer are read" in judge_kind(config).check(config)
    for name in (model, adapters["over a damaged base"], damaged):
        config = judged_by(name, tmp_path)
        with pytest.raises(UserError, match="NaN or infinite weights in 1 tensors"):
            judge_kind(config).check(config)
