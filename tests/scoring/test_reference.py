"""Scoring a run folder: pairs that cannot be scored, memory that runs out, stale or foreign results."""

from __future__ import annotations

import copy
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdpo.data.pairs import pair_ids, read_pairs
from bdpo.errors import UserError
from bdpo.models.arrangement import length_sorted_batches
from bdpo.models.logps import LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.scoring import shard_scorer
from bdpo.scoring.reference import ReferenceScorer, reference_logps
from bdpo.scoring.scores import (
    MAX_UNSCORABLE,
    SCORE_SCHEMA,
    finish_scores,
    read_scores,
    score_fingerprint,
    score_store,
    unscorable_error,
)
from bdpo.scoring.shard_scorer import ShardScorer, score_with_bisection
from bdpo.storage.run_dir import RunDir
from pipelines import score
from pipelines.prepare import Prepare
from pipelines.runtime import pool
from tests.support.helpers import (
    encoded_pairs,
    invented_pairs,
    naive_logps,
    save_model,
    tiny_config,
    tiny_qwen2,
    write_jsonl,
)
from tests.support.scored_run import prepared_run, score_here, scored_run

pytestmark = pytest.mark.long

RAISES, KILLS, NOT_A_NUMBER = "~", "@", "^"


class UnluckyScorer(ShardScorer):
    """Cannot score three kinds of pairs: one raises, one is not a number, one kills the process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        tokens = self.scorer.chat.tokenizer.convert_tokens_to_ids
        with torch.no_grad():
            self.scorer.model.model.get_input_embeddings().weight[tokens(NOT_A_NUMBER)] = torch.nan
        self.scorer.model.register_forward_pre_hook(self.look)
        self.raising, self.killing = tokens(RAISES), tokens(KILLS)

    def look(self, _, args):
        seen = set(args[0].input_ids.flatten().tolist())
        if self.killing in seen:
            os._exit(9)
        if self.raising in seen:
            raise IndexError("the text of a prompt")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_chat):
    return save_model(tmp_path_factory.mktemp("model"), tiny_chat)


@pytest.fixture
def make_run(tmp_path, model, capsys):
    """make_run(rows, **config): config and run folder with prepared pairs."""

    def make(rows, **changes):
        data = write_jsonl(tmp_path / "pairs.jsonl", rows)
        config = tiny_config(tmp_path / "run", model, data, **changes)
        return config, prepared_run(config)

    return make


def with_mark(row, mark):
    return row | {"prompt": f"{mark} {row['prompt']}"}


@pytest.mark.ray
def test_pairs_that_cannot_be_scored_are_named_when_all_others_are_scored(
    sent_by_value, make_run, tmp_path, monkeypatch
):
    """One raises, one is not finite, one kills its process every time; the next run needs only these."""
    rows, bad = invented_pairs(26), {3: RAISES, 12: NOT_A_NUMBER, 21: KILLS}
    rows = [with_mark(row, bad[i]) if i in bad else row for i, row in enumerate(rows)]
    config, run = make_run(rows, score={"shard_rows": 4})
    ids = list(pair_ids(run.pairs))
    monkeypatch.setattr(shard_scorer, "ShardScorer", UnluckyScorer)
    monkeypatch.setattr(pool, "ATTEMPTS", 1)
    with pytest.raises(UserError) as refused:
        run_score(config, run)
    message = str(refused.value)
    assert "\n" not in message
    assert f"pair_id {ids[3]} (row 3 of data/pairs): IndexError at test_reference.py:" in message
    assert f"pair_id {ids[12]} (row 12 of data/pairs): a log-prob is not finite" in message
    assert f"pair_id {ids[21]} (row 21 of data/pairs): its actor died of it" in message
    assert message.count("pair_id") == 3
    assert "text of a prompt" not in message
    store = score_store(run, score_fingerprint(config, run))
    assert store.missing(26, 8) == [(3, 1), (12, 1), (21, 1)]
    assert not (run.scores / "manifest.json").exists()

    monkeypatch.setattr(shard_scorer, "ShardScorer", ShardScorer)
    assert len(score_here(config, run)) == 3
    whole = RunDir(tmp_path / "whole")
    whole.root.mkdir()
    whole.data.symlink_to(run.data)
    score_here(config, whole)
    uninterrupted, recovered = score_store(whole, store.fingerprint).read(), store.read()
    assert recovered["pair_id"].to_pylist() == uninterrupted["pair_id"].to_pylist() == ids
    for column in ("ref_chosen_logps", "uncond_rejected_logps", "mi_chosen"):
        ours, theirs = (torch.tensor(t[column].to_pylist()) for t in (recovered, uninterrupted))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_every_bad_row_is_found_and_every_other_row_scored(bad):
    def scores(table):
        if any(table["bad"].to_pylist()):
            raise ZeroDivisionError
        return table

    rows, reasons = [], {}
    for offset, outcome in score_with_bisection(scores, pa.table({"row": range(len(bad)), "bad": bad})):
        if isinstance(outcome, str):
            reasons[offset] = outcome
        else:
            assert outcome["row"][0].as_py() == offset
            rows += outcome["row"].to_pylist()
    assert sorted([*rows, *reasons]) == list(range(len(bad)))
    assert list(reasons) == [row for row, is_bad in enumerate(bad) if is_bad]
    assert all(reason.startswith("ZeroDivisionError at test_reference.py:") for reason in reasons.values())


def naive_scores(model, tokenizer, row, empty):
    """Every number of a row of scores, in float64, one sequence at a time; `empty` is the text of c(∅).

    Each to a relative 1e-5; MI is a difference, so what rounding leaves of it is measured by its terms.
    """

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    approx = partial(pytest.approx, rel=1e-5)
    prompt = ids(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")
    expected, means = {"prompt_tokens": len(prompt)}, {}
    for side in ("chosen", "rejected"):
        response = ids(row[side] + "<|im_end|>")
        tokens = len(response)
        ref, uncond = naive_logps(model, [(prompt, response), (ids(empty), response)]).tolist()
        expected |= {
            f"{side}_tokens": tokens,
            f"ref_{side}_logps": approx(ref),
            f"uncond_{side}_logps": approx(uncond),
            f"mi_{side}": pytest.approx((ref - uncond) / tokens, rel=0, abs=1e-5 * abs(ref) / tokens),
        }
        sequence = torch.tensor([prompt + response])
        with torch.no_grad():
            states = copy.deepcopy(model).double()(sequence, output_hidden_states=True).hidden_states[-1][0]
        means[side] = states[len(prompt) - 1 : -1].sum(0) / tokens
    alike = means["chosen"] @ means["rejected"] - means["chosen"] @ means["chosen"]
    return expected | {"ches": approx(alike.item())}


EMPTY = {"empty_turn": "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", "bos": "<s>"}


@pytest.mark.parametrize("mode", EMPTY)
def test_every_column_is_what_one_sequence_at_a_time_says(mode, make_run, tiny_chat):
    rows = invented_pairs(12)
    rows[3] |= {"chosen": "n", "rejected": "yes cedar fern delta amber basil"}
    rows[7] |= {"chosen": "yes ember basil amber cedar cedar fern", "rejected": "o"}
    config, run = make_run(rows, score={"unconditional": mode, "tokens_per_batch": 300})
    scorer, batches = ReferenceScorer(config, "cpu"), []
    scorer.model.register_forward_pre_hook(
        lambda module, args: batches.append(int(args[0].responses[-1]) + 1)
    )
    scores = scorer.score(read_pairs(run.pairs, 0, len(rows)))
    assert scores.schema == SCORE_SCHEMA
    for _ in ("conditional", "unconditional"):  # several batches each
        of_pass = []
        while sum(of_pass) < 2 * len(rows):
            of_pass.append(batches.pop(0))
        assert len(of_pass) > 2
        assert sum(of_pass) == 2 * len(rows)
    numbers = set(SCORE_SCHEMA.names) - {"pair_id", "group"}
    for row, found, pair_id in zip(rows, scores.to_pylist(), pair_ids(run.pairs), strict=True):
        expected = naive_scores(tiny_qwen2(), tiny_chat.tokenizer, row, EMPTY[mode])
        assert expected.keys() == numbers
        assert (found["pair_id"], found["group"]) == (pair_id, row["group"])
        assert {name: found[name] for name in numbers} == expected


def test_a_model_that_fits_nothing_is_not_bisected_for_ever(make_run):
    config, run = make_run([with_mark(row, RAISES) for row in invented_pairs(30)], score={"shard_rows": 30})
    (said,) = score_here(config, run, UnluckyScorer)
    reasons = json.loads(said["unscorable"])
    assert len(reasons) == MAX_UNSCORABLE + 1
    assert "stopped, more than 16 pairs" in str(
        unscorable_error(run, {int(row): why for row, why in reasons.items()})
    )


def test_a_process_that_lost_its_gpu_ends_instead_of_blaming_its_pairs(make_run):
    config, run = make_run(invented_pairs(3))

    class LostGpu(ShardScorer):
        def __init__(self, *args):
            super().__init__(*args)
            self.scorer.model.register_forward_pre_hook(self.lose)

        def lose(self, *_):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    child = os.fork()
    if child == 0:
        score_here(config, run, LostGpu)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_model_that_an_actor_cannot_load_is_said_in_one_line(make_run, tmp_path, model):
    config, run = make_run(invented_pairs(9))
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"qwen2"', '"t5"'))
    other = changed(config, {"model": {"name_or_path": str(tmp_path / "model")}})
    with pytest.raises(
        UserError, match=f"^{tmp_path / 'model'}: cannot be loaded as a causal language model"
    ):
        score_here(other, run)
    assert not run.scores.exists()


def test_an_actor_that_scores_gives_signs_of_life_within_each_forward_and_counts_its_rows(make_run):
    config, run = make_run(invented_pairs(9), score={"tokens_per_batch": 300})
    actor, signs, forwards = ShardScorer(config, run, score_fingerprint(config, run), "cpu"), [], []
    actor.progress = signs.append
    actor.scorer.model.register_forward_pre_hook(lambda *_: forwards.append(len(signs)))
    actor({"first": 2, "rows": 7})
    layers = actor.scorer.model.model.config.num_hidden_layers
    assert len(forwards) > 4
    assert len(signs) == 1 + len(forwards) * (layers + 1)
    assert signs == sorted(signs)
    assert (signs[0], signs[-1]) == (0, pytest.approx(7))
    assert len(set(signs)) == 1 + len(forwards)


def test_rows_that_are_scored_alone_count_once(make_run):
    rows = invented_pairs(8)
    config, run = make_run([with_mark(row, RAISES) if n == 5 else row for n, row in enumerate(rows)])
    actor, signs = UnluckyScorer(config, run, score_fingerprint(config, run), "cpu"), []
    actor.progress = signs.append
    actor({"first": 0, "rows": 8})
    assert signs[-1] == pytest.approx(8)
    assert max(signs) == signs[-1]


def test_a_shard_that_comes_again_after_its_commit_is_not_forwarded_again(make_run):
    config, run = make_run(invented_pairs(9))
    actor = ShardScorer(config, run, score_fingerprint(config, run), "cpu")
    first = actor({"first": 0, "rows": 9})
    committed = {file.name for file in run.scores.iterdir()}
    forwarded = actor.scorer.model.tokens_forwarded
    assert committed
    assert forwarded
    assert actor({"first": 0, "rows": 9}) == first
    assert actor.scorer.model.tokens_forwarded == forwarded
    assert {file.name for file in run.scores.iterdir()} == committed


@pytest.mark.parametrize("column", ["ref_chosen", "ref_rejected", "uncond_chosen", "uncond_rejected"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_every_sum_of_log_probs_has_to_be_finite(make_run, monkeypatch, column, value):
    config, run = make_run(invented_pairs(3))
    scorer = ReferenceScorer(config, "cpu")

    @torch.inference_mode()
    def broken(*arguments):
        logps, ches_values = reference_logps(*arguments)
        logps[f"{column}_logps"][1] = value
        return logps, ches_values

    monkeypatch.setattr("bdpo.scoring.reference.reference_logps", broken)
    with pytest.raises(FloatingPointError, match="a log-prob is not finite"):
        scorer.score(read_pairs(run.pairs, 0, 3))


def test_a_node_with_another_model_or_without_the_pairs_scores_nothing(make_run):
    config, run = make_run(invented_pairs(9))
    fingerprint = score_fingerprint(config, run)
    for field in ("weights", "tokenizer"):
        with pytest.raises(UserError, match=f"^model.name_or_path=.*: on host .* {field} differs"):
            ShardScorer(config, run, {**fingerprint, field: "another"}, "cpu")
    actor = ShardScorer(config, run, fingerprint, "cpu")
    shutil.rmtree(run.pairs)
    with pytest.raises(UserError, match="does not see all prepared pairs"):
        actor({"first": 0, "rows": 1})
    assert not run.scores.exists()


class Memory:
    """Room for so many tokens: a larger batch raises what torch raises; the responses of the others."""

    def __init__(self, model, tokens, error):
        self.sizes = []
        self.tokens, self.error = tokens, error
        model.register_forward_pre_hook(self.allocate)

    def allocate(self, model, args):
        (batch,) = args
        if batch.input_ids.numel() > self.tokens:
            raise self.error
        self.sizes.append(int(batch.responses[-1]) + 1)


SHAPES = [(10, 9, 8), (3, 4, 5), (12, 2, 2), (5, 5, 5), (1, 1, 1), (20, 9, 1), (7, 7, 7)] * 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out_halves_the_batches(error):
    model, pairs = LogpsModel(tiny_qwen2(), 128), PrefixGroups.of(encoded_pairs(SHAPES))
    expected, alike = reference_logps(model, pairs, [1, 2], 400)
    memory = Memory(model, 100, error)
    ours, alike_too = reference_logps(model, pairs, [1, 2], 400)
    torch.testing.assert_close(alike_too, alike, rtol=1e-5, atol=1e-5)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)
    # halved no more often than needed: 400 -> 200 -> 100 tokens, by hand for the four terms
    planned = length_sorted_batches(model.layout.tokens(pairs.lengths).tolist(), 100)
    assert len(memory.sizes) <= 2 * (len(planned) + 2 * len(pairs))
    assert max(memory.sizes) > 8


def test_a_batch_without_room_is_cut_in_the_middle():
    """Halves of equal pairs, which fit at once; one pair alone and the others would be tried many times."""
    model, pairs = LogpsModel(tiny_qwen2(), 128), PrefixGroups.of(encoded_pairs([(9, 8, 8)] * 16))
    memory = Memory(model, 200, MemoryError())
    reference_logps(model, pairs, [1, 2], 400)
    conditional, unconditional = memory.sizes[:2], memory.sizes[2:]
    assert conditional == [2 * 8, 2 * 8]  # responses of 8 pairs
    assert unconditional == [16, 16]


def test_a_bad_row_is_found_in_as_many_tries_as_halving_takes():
    tries = []

    def scores(table):
        tries.append(table.num_rows)
        if 5 in table["row"].to_pylist():
            raise ZeroDivisionError
        return table

    outcomes = dict(score_with_bisection(scores, pa.table({"row": range(64)})))
    assert isinstance(outcomes[5], str)
    assert sorted(tries) == sorted([64, 32, 32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1])


def test_a_pair_that_fits_in_no_batch_is_named_and_the_others_are_scored(make_run):
    rows = [{"prompt": f"{i} a?", "chosen": "yes", "rejected": "no"} for i in range(9)]
    rows[4]["prompt"] += " fern" * 12  # 60 tokens more than the others' 30
    config, run = make_run(rows, score={"shard_rows": 9})

    class SmallMemory(ShardScorer):
        def __init__(self, *args):
            super().__init__(*args)
            error = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate")
            Memory(self.scorer.model, 60, error)

    (said,) = score_here(config, run, SmallMemory)
    assert json.loads(said["unscorable"]) == {"4": "out of memory, alone in its batch"}
    assert score_store(run, score_fingerprint(config, run)).missing(9, 9) == [(4, 1)]


def test_the_manifest_says_who_did_how_much(make_run):
    config, run = make_run(invented_pairs(20))
    score_here(config, run)
    manifest = finish_scores(run, score_fingerprint(config, run), 1.0)
    (work,) = manifest["workers"].values()
    scores = read_scores(config, run).to_pylist()
    real = sum(row["prompt_tokens"] + 2 * (row["chosen_tokens"] + row["rejected_tokens"]) for row in scores)
    assert (work["pairs"], work["tokens"]) == (20, real)
    assert real < work["tokens_forwarded"] < 2 * real
    assert work["seconds"] > 0


def test_rows_of_other_pairs_are_not_taken_for_finished(make_run):
    config, run = make_run(invented_pairs(20))
    score_here(config, run)
    store = score_store(run, score_fingerprint(config, run))
    swapped = store.read_shard(8).take([1, 0, *range(2, 8)])
    store.remove(8)
    store.write(8, swapped)
    with pytest.raises(RuntimeError, match="row 8 does not belong to the pair"):
        finish_scores(run, store.fingerprint, 1.0)
    store.remove(16)
    store.remove(8)
    with pytest.raises(RuntimeError, match="row 8"):
        finish_scores(run, store.fingerprint, 1.0)


def test_scores_that_are_made_again_are_not_said_to_be_finished(make_run, monkeypatch):
    config, run = make_run(invented_pairs(20))
    score_here(config, run)
    store = score_store(run, score_fingerprint(config, run))
    finish_scores(run, store.fingerprint, 1.0)
    store.remove(8)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score.Score, "_score_in_rounds", killed)
    with pytest.raises(KeyboardInterrupt):
        score.Score(config, run).complete()
    assert not (run.scores / "manifest.json").exists()


def run_score(config, run):
    """What the command does in a run folder."""
    Prepare(config, run).complete()
    return score.Score(config, run).complete()


def other_weights(config, folder, chat):
    save_model(folder, chat, seed=1)


def other_tokenizer(config, folder, chat):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"add_prefix_space":false', '"add_prefix_space": false') + "\n")


def other_template(config, folder, chat):
    file = folder / "chat_template.jinja"
    file.write_text(
        file.read_text()
        .replace("assistant", "model")
        .replace("{{ m.role }}", "{{ 'model' if m.role == 'assistant' else m.role }}")
    )


def other_pairs(config, folder, chat):
    data = Path(config.data.path)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))


CHANGES = {
    "weights": other_weights,
    "tokenizer": other_tokenizer,
    "chat_template": other_template,
    "unconditional": {"score": {"unconditional": "bos"}},
    "max_length": {"data": {"max_length": 120}},
    "max_prompt_length": {"data": {"max_prompt_length": 90}},
    "dtype": {"model": {"dtype": "bfloat16"}},
    "pairs": other_pairs,
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_chat, model):
    folder = tmp_path_factory.mktemp("finished")
    data = write_jsonl(folder / "pairs.jsonl", invented_pairs(12))
    scored_run(tiny_config(folder / "run", model, data))
    return folder


def changed(values, changes):
    sections = {name: getattr(values, name).model_copy(update=keys) for name, keys in changes.items()}
    return values.model_copy(update=sections)


@pytest.mark.parametrize("field", CHANGES)
def test_scores_of_other_inputs_are_refused_by_the_fields_name(
    field, finished_run, model, tmp_path, tiny_chat
):
    """Finished or interrupted; and every field of the fingerprint is tried here."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    shutil.copytree(model, tmp_path / "model")
    paths = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "pairs.jsonl")},
    }
    config = changed(tiny_config(tmp_path / "run", model, tmp_path / "pairs.jsonl"), paths)
    run = RunDir(config.run_dir)
    before = score_fingerprint(config, run)
    assert set(before) == set(CHANGES)
    assert read_scores(config, run).num_rows == 12
    if callable(CHANGES[field]):
        CHANGES[field](config, tmp_path / "model", tiny_chat)
    else:
        config = changed(config, CHANGES[field])
    if field == "pairs":
        shutil.rmtree(run.data)
        Prepare(config, run).complete()
    now = score_fingerprint(config, run)
    assert {name for name in now if now[name] != before[name]} == {field}
    with pytest.raises(UserError, match=rf"made with {field}="):
        read_scores(config, run)
    (run.scores / "manifest.json").unlink()
    with pytest.raises(UserError, match=rf"made with {field}="):
        score_store(run, now).missing(12, 8)
