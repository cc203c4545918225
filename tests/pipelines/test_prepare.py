"""Preparing as a stage: every run compares some of its pairs with what the chat template writes."""

from __future__ import annotations

import json

import pytest

from bdpo.errors import UserError
from bdpo.models.template import PROBE
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.storage.run_dir import RunDir
from pipelines.prepare import FAITHFUL_PAIRS, Prepare
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl

PAIRS = 2 * FAITHFUL_PAIRS


@pytest.fixture
def config(tmp_path, tiny_chat):
    model = save_model(tmp_path / "model", tiny_chat)
    return tiny_config(tmp_path / "run", model, write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(PAIRS)))


def complete(config):
    return Prepare(config, RunDir(config.run_dir)).complete()


def test_a_sound_run_says_how_many_pairs_it_compared(config, capsys):
    complete(config)
    assert f"; {FAITHFUL_PAIRS} compared with the chat template" in capsys.readouterr().out.replace("\n", " ")


def break_encoding(monkeypatch):
    """Prompts and responses lose their first token where many texts are encoded at a time."""
    right = ChatTokenizer.ids_of_texts
    monkeypatch.setattr(
        ChatTokenizer,
        "ids_of_texts",
        lambda self, *given, **how: [ids[1:] for ids in right(self, *given, **how)],
    )


def test_a_run_whose_encoding_is_broken_is_refused(config, monkeypatch):
    break_encoding(monkeypatch)
    with pytest.raises(UserError, match="chosen: the prepared token ids are not those of its text"):
        complete(config)


def test_a_run_is_compared_again_when_it_resumes(config, monkeypatch):
    """Its pairs were prepared, and answers are encoded in another way by now, but for the probe."""
    complete(config)
    right = ChatTokenizer.answer_ids
    monkeypatch.setattr(
        ChatTokenizer,
        "answer_ids",
        lambda self, text: right(self, text) if text == PROBE else right(self, text)[1:],
    )
    with pytest.raises(UserError, match="chosen: the chat template does not write prompt, response and end"):
        complete(config)


def test_a_run_whose_template_shortens_answered_questions_is_refused(config, tmp_path):
    file = tmp_path / "model" / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert "{{ m.content }}" in text
    shortened = "{{ m.content[:9] if loop.length > 1 else m.content }}"
    file.write_text(text.replace("{{ m.content }}", shortened), encoding="utf-8")
    with pytest.raises(
        UserError, match="the chat template writes the prompt or the end of the turn in another"
    ):
        complete(config)


def test_rows_with_a_key_without_effect_are_compared_as_well(config, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": row["prompt"], "id": str(number)}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    break_encoding(monkeypatch)
    with pytest.raises(UserError, match="the prepared token ids are not those of its text"):
        complete(config)
