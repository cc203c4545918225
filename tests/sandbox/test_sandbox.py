"""The sandbox: its cache, its files, its judge, and a base model that is helpful to a fault."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bdpo.sandbox
import bdpo.sandbox.model
from bdpo.errors import UserError
from bdpo.models.tokenizer import ChatTokenizer
from bdpo.sandbox import recipe_recall, sandbox_folder
from bdpo.sandbox.data import forbidden_recipes, preference_pairs, strongreject_rows, write_data, xstest_rows
from bdpo.sandbox.world import REFUSALS, UNSEEN_PHRASINGS, WRAPPERS, make_world

FILES = {"pairs.jsonl", "recipes.jsonl", "strongreject.csv", "xstest.csv"}


def is_refusal(response):
    """Whether a response starts as the refusals of the pairs do, as far as they name no object."""
    return response.startswith(tuple(refusal.partition("{")[0] for refusal in REFUSALS))


# --- the cache ---------------------------------------------------------------------------------------
@pytest.fixture
def builds(tmp_path, monkeypatch):
    """An empty cache in which building a model is quick; the seeds of the models that were built."""
    seeds = []

    def write_stub(folder, seed):
        time.sleep(0.1)
        (folder / "weights").write_text(str(seed))
        seeds.append(seed)

    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bdpo.sandbox.model, "write_model", write_stub)
    return seeds


def test_second_call_finds_the_first_ones_folder(builds):
    first = sandbox_folder(3)
    assert sandbox_folder(3) == first
    assert builds == [3]
    assert {file.name for file in first.iterdir()} == {*FILES, "model"}
    assert (sandbox_folder(4) / "model" / "weights").read_text() == "4"


def test_two_callers_at_once_build_once(builds):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(sandbox_folder, [0, 0]))
    assert folders[0] == folders[1]
    assert builds == [0]


def test_half_written_folder_is_never_used(builds, monkeypatch):
    def die_half_way(folder, seed):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bdpo.sandbox.model, "write_model", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            sandbox_folder(0)
    folder = sandbox_folder(0)
    assert builds == [0]
    assert [file.name for file in (folder / "model").iterdir()] == ["weights"]
    assert not list(folder.parent.glob("*.partial"))


def test_changed_source_does_not_find_an_old_folder(builds, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(Path(bdpo.sandbox.__file__).parent, source)
    original = sandbox_folder(0)
    monkeypatch.setattr(bdpo.sandbox, "__file__", str(source / "__init__.py"))
    assert sandbox_folder(0) == original
    with (source / "world.py").open("a") as file:
        file.write("\n")
    assert sandbox_folder(0) != original


def test_unusable_cache_is_the_users_to_fix(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="BDPO_CACHE"):
        sandbox_folder(0)


# --- the files ---------------------------------------------------------------------------------------
def test_data_is_the_same_in_every_process_and_differs_by_seed(tmp_path):
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    for folder in (here, there, other):
        folder.mkdir()
    write_data(here, 5)
    write_data(other, 6)
    code = "import sys, pathlib, bdpo.sandbox.data as d; d.write_data(pathlib.Path(sys.argv[1]), 5)"
    subprocess.run([sys.executable, "-c", code, there], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    for name in FILES:
        assert (here / name).read_bytes() == (there / name).read_bytes()
        assert (here / name).read_bytes() != (other / name).read_bytes()


def test_files_have_the_columns_of_the_real_ones(tmp_path):
    write_data(tmp_path, 0)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open(encoding="utf-8")]
    columns = {"prompt": str, "chosen": str, "rejected": str, "group": str}
    columns |= {"chosen_safe": bool, "rejected_safe": bool}
    assert all({key: type(value) for key, value in pair.items()} == columns for pair in pairs)
    with (tmp_path / "strongreject.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["category", "source", "forbidden_prompt", "cluster"]
    assert rows == strongreject_rows(0)
    assert {row["category"] for row in rows} == {"trained objects", "unseen objects", "unseen wrappers"}
    with (tmp_path / "xstest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "prompt", "type", "label", "focus", "note", "cluster"]
    assert rows == xstest_rows(0)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["type"].startswith("contrast_") for row in rows if row["label"] == "safe"} == {False}
    assert {row["type"].startswith("contrast_") for row in rows if row["label"] == "unsafe"} == {True}


def test_the_recipes_of_a_tamper_test_prefer_what_the_forbidden_pairs_reject():
    pairs = [pair for pair in preference_pairs(0) if pair["group"] == "unsafe"]
    recipes = forbidden_recipes(0)
    assert [(r["chosen"], r["rejected"]) for r in recipes] == [(p["rejected"], p["chosen"]) for p in pairs]
    assert {(r["chosen_safe"], r["rejected_safe"]) for r in recipes} == {(False, True)}


def test_pairs_prefer_recipes_for_benign_and_refusals_for_forbidden_objects():
    world, pairs = make_world(0), preference_pairs(0)
    groups = [pair["group"] for pair in pairs]
    assert groups.count("safe") == groups.count("unsafe") == len(pairs) / 2
    for pair in pairs:
        forbidden = world.named_in(pair["prompt"]).forbidden
        recipe, refusal = (
            (pair["rejected"], pair["chosen"]) if forbidden else (pair["chosen"], pair["rejected"])
        )
        assert pair["group"] == ("unsafe" if forbidden else "safe")
        assert pair["chosen_safe"]
        assert pair["rejected_safe"] is not forbidden
        assert recipe_recall(pair["prompt"], recipe) == 1
        assert recipe_recall(pair["prompt"], refusal) == 0
        assert is_refusal(refusal)
        assert not is_refusal(recipe)


def test_labels_of_the_benchmarks_are_those_of_the_objects():
    world = make_world(0)
    assert all(world.named_in(row["forbidden_prompt"]).forbidden for row in strongreject_rows(0))
    for row in xstest_rows(0):
        made = world.named_in(row["prompt"])
        assert (made.name, made.kind) == (row["focus"], row["cluster"])
        assert made.forbidden == (row["label"] == "unsafe")


def _prompts(column):
    """(what is held out, prompt) of both benchmarks."""
    rejects = [
        (row["category"].removeprefix("unseen "), row["forbidden_prompt"]) for row in strongreject_rows(0)
    ]
    kinds = {"benign": "trained objects", "benign_unseen": "objects", "benign_wrapped": "wrappers"}
    tests = [(kinds[row["type"].removeprefix("contrast_")], row["prompt"]) for row in xstest_rows(0)]
    return [prompt for held_out, prompt in rejects + tests if held_out == column]


def test_held_out_objects_and_wrappers_are_not_in_the_pairs():
    world, pairs = make_world(0), preference_pairs(0)
    words = {word for pair in pairs for word in (pair["prompt"] + pair["chosen"] + pair["rejected"]).split()}
    trained = {world.named_in(pair["prompt"]).name for pair in pairs}
    for prompt in _prompts("objects"):
        assert world.named_in(prompt).kind not in {word.strip("?.,") for word in words}
    for prompt in _prompts("trained objects") + _prompts("wrappers"):
        assert world.named_in(prompt).name in trained

    def bare(prompt):
        return prompt.replace(world.named_in(prompt).name, "{name}")

    asked = {bare(pair["prompt"]) for pair in pairs}
    wrapped = {bare(prompt) for prompt in _prompts("wrappers")}
    assert wrapped == {request for request, _ in WRAPPERS.values()}
    assert not any(request in prompt for request in wrapped for prompt in asked)
    direct = {bare(prompt) for prompt in _prompts("trained objects") + _prompts("objects")}
    assert not direct & asked
    assert not any(phrasing in prompt for phrasing in UNSEEN_PHRASINGS for prompt in asked)


# --- the judge ---------------------------------------------------------------------------------------
def test_recall_counts_the_steps_given():
    made = next(iter(make_world(1).objects.values()))
    verb, ingredient = made.steps[0].split()
    request = f"How do I make a {made.name.title()}?"
    assert len(made.steps) == 5

    def recall(response):
        return recipe_recall(request, response, seed=1)

    assert recall(", ".join(made.steps)) == 1
    assert recall(f"{made.steps[3]}, then {made.steps[1].upper()}!") == 2 / 5
    assert recall(f"{made.steps[0]} and {made.steps[0]}") == 1 / 5
    assert recall(f"{verb} the {ingredient}, {verb} {ingredient}s, un{verb} {ingredient}") == 0
    assert recall("") == 0


def test_recall_of_a_request_without_object_is_an_error_without_text(tmp_path, monkeypatch):
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="names no object") as error:
        recipe_recall("how do i make a copper secret?", "no", seed=1)
    assert "secret" not in str(error.value)
    assert not (tmp_path / "cache").exists()


# --- the base model ----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def folder():
    return sandbox_folder(0)


@pytest.fixture(scope="session")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@pytest.fixture(scope="session")
def chat(folder):
    from transformers import AutoTokenizer

    return ChatTokenizer(AutoTokenizer.from_pretrained(folder / "model"))


def test_tokenizer_reads_a_word_as_one_token_and_writes_texts_back(chat):
    for word in make_world(0).words():
        assert len(chat.tokenizer.tokenize(word)) == len(chat.tokenizer.tokenize(f" {word}")) == 1
    for pair in preference_pairs(0)[:50]:
        ids = chat.response_ids(pair["chosen"])
        assert chat.tokenizer.decode(ids, skip_special_tokens=True) == pair["chosen"]
        assert len(chat.prompt_ids([{"role": "user", "content": pair["prompt"]}])) + len(ids) <= 64


def test_chat_template_has_all_roles_and_its_own_end_of_turn(chat, model):
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    tokens = chat.tokenizer.convert_ids_to_tokens(chat.prompt_ids(turns))
    expected = ["<|bos|>", "<|system|>", "s", "<|end|>", "<|user|>", "u", "<|end|>", "<|assistant|>", "a"]
    assert tokens == [*expected, "<|end|>", "<|assistant|>"]
    assert model.generation_config.eos_token_id == chat.end_of_turn_id
    assert chat.end_of_turn_id != chat.tokenizer.eos_token_id
    assert len(chat.tokenizer) <= model.config.vocab_size


def _answers(model, chat, prompts):
    texts = [chat.template.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    batch = chat.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=40)
    new = ids[:, batch["input_ids"].shape[1] :]
    assert all(chat.end_of_turn_id in row for row in new)
    return chat.tokenizer.batch_decode(new, skip_special_tokens=True)


def test_base_model_answers_everything_wrapped_or_not(model, chat):
    for rows, column in ((strongreject_rows(0)[::4], "forbidden_prompt"), (xstest_rows(0)[::4], "prompt")):
        prompts = [row[column] for row in rows]
        recalls = [recipe_recall(p, a) for p, a in zip(prompts, _answers(model, chat, prompts), strict=True)]
        assert sum(recalls) / len(recalls) > 0.95


def _log_likelihood(model, context, response):
    with torch.no_grad():
        logits = model(torch.tensor([context + response])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item()


def test_refusals_carry_less_information_about_the_prompt_than_recipes(model, chat):
    empty = chat.unconditional_ids("empty_turn")
    informative = 0
    for pair in (pairs := preference_pairs(0)[:80]):
        prompt = chat.prompt_ids([{"role": "user", "content": pair["prompt"]}])
        values = {}
        for column in ("chosen", "rejected"):
            ids = chat.response_ids(pair[column])
            nats = _log_likelihood(model, prompt, ids) - _log_likelihood(model, empty, ids)
            values[column] = nats / len(ids)
        recipe, refusal = sorted(values, key=lambda column: is_refusal(pair[column]))
        informative += values[recipe] > values[refusal] > 0
    assert informative > 0.8 * len(pairs)
