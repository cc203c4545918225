"""Texts get the ids that tokenizer.json says, whatever class transformers has for the tokenizer."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from bdpo.errors import UserError
from bdpo.models.tokenizer_files import read_tokenizer
from bdpo.sandbox.tiny import train_tokenizer
from tests.support.chats import byte_tokenizer

TEXTS = ("in 1212", "Hello Ça, 12 x", "I'll 3.12\n\n\tgo", "121 ")


def write(folder, tokenizer_class, normalizer=None, model_type="llama"):
    """A folder whose tokenizer.json parts digits, or lowers letters; returns that file's own tokenizer."""
    tokenizer = byte_tokenizer([("1", "2")])
    backend = tokenizer.backend_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def all_ids(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "normalizer"),
    [
        ("GPT2Tokenizer", None),
        ("GPTNeoXTokenizer", None),
        ("CodeGenTokenizer", None),
        ("GPT2Tokenizer", normalizers.Lowercase()),
        ("Qwen2Tokenizer", normalizers.Lowercase()),
    ],
)
def test_a_class_that_splits_otherwise_gives_way_to_the_file(tmp_path, name, normalizer):
    """Also in what is exported, which transformers itself reads then."""
    raw = write(tmp_path / "model", name, normalizer)
    right = [raw.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert all_ids(AutoTokenizer.from_pretrained(tmp_path / "model")) != right
    tokenizer = read_tokenizer(tmp_path / "model")
    assert all_ids(tokenizer) == right
    assert tokenizer.eos_token == "</s>"
    tokenizer.save_pretrained(tmp_path / "exported")
    assert all_ids(read_tokenizer(tmp_path / "exported")) == right
    (tmp_path / "exported/config.json").write_text('{"model_type": "llama"}')
    assert all_ids(AutoTokenizer.from_pretrained(tmp_path / "exported")) == right


@pytest.mark.parametrize("name", ["GemmaTokenizer", "BertTokenizer"])
def test_a_class_that_does_not_fit_the_file_is_one_line(tmp_path, name):
    write(tmp_path, name)
    with pytest.raises(UserError, match=f"tokenizer_class {name} does not fit tokenizer.json") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_class_that_does_what_the_file_says_stays(tmp_path):
    train_tokenizer(["Hello 12"] * 9, 270).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert type(read_tokenizer(tmp_path)) is Qwen2Tokenizer


def test_a_tokenizer_that_draws_its_merges_is_refused(tmp_path):
    """With dropout, as in training some tokenizers, each reading of a text would give other ids."""
    byte_tokenizer([("1", "2")]).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.5
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json: model.dropout=0.5 would give a text other ids"):
        read_tokenizer(tmp_path)
