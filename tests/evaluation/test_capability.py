from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bdpo.config.evaluate import CapabilityFiles
from bdpo.errors import UserError
from bdpo.evaluation.capability import (
    ADVGLUE,
    NOT_RUN,
    TASKS,
    Accuracies,
    NotRun,
    accuracies,
    capability_fingerprint,
    read_result,
    run_capability,
    task_manager,
)
from bdpo.stats import rate
from bdpo.storage.manifests import read_facts, write_manifest
from tests.support.chats import CHATML, byte_tokenizer
from tests.support.helpers import tiny_qwen2


def test_what_the_harness_reports_becomes_pooled_and_single_estimates() -> None:
    right = {"adv_sst2": (3, 4), "adv_qqp": (1, 3), "adv_mnli": (0, 7)}
    right |= {task: (5, 10) for task in ADVGLUE if task not in right}
    results = {
        "results": {
            task: {"acc,none": hits / n, "acc_stderr,none": 0.1} for task, (hits, n) in right.items()
        },
        "n-samples": {task: {"original": 99, "effective": n} for task, (_, n) in right.items()},
    }
    found = accuracies("advglue", results)
    assert found.tasks["adv_qqp"] == rate([True, False, False])
    hits, n = (sum(pair[i] for pair in right.values()) for i in (0, 1))
    assert (found.accuracy.value, found.accuracy.n) == (hits / n, n)
    assert found.accuracy.interval == "exact"


@pytest.mark.parametrize(
    "result", [Accuracies(rate([True, False]), {"gsm8k": rate([True, False])}), NotRun("no network")]
)
def test_a_result_is_read_back_from_its_file(result, tmp_path: Path) -> None:
    write_manifest(tmp_path / "gsm8k.json", {"weights": "w"}, **asdict(result))
    assert read_result(read_facts(tmp_path / "gsm8k.json")) == result


def test_the_harness_has_every_task_that_a_benchmark_names() -> None:
    templates = {task: template for task, (template, _) in ADVGLUE.items()}
    needed = {templates.get(task, task) for tasks in TASKS.values() for task in tasks}
    assert needed <= set(task_manager().all_tasks)


def templated() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = "</s>"
    return tokenizer


def test_gsm8k_is_read_from_a_local_file_and_its_examples_are_other_rows(tmp_path: Path) -> None:
    """Right answers are found: the file's own answer is what a model that copies would be scored by."""
    rows = [{"question": f"{n}+1?", "answer": f"so {n + 1}\n#### {n + 1}"} for n in range(8)]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_capability("gsm8k", tiny_qwen2(), templated(), limit=2, file=str(file))
    assert isinstance(found, Accuracies), found
    assert (found.accuracy.n, list(found.tasks)) == (2, ["gsm8k"])


def test_a_result_depends_on_the_content_of_local_data(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    marks = []
    for answer in ("a", "b"):
        file.write_text((json.dumps({"question": "1+1?", "answer": answer}) + "\n") * 6)
        marks.append(capability_fingerprint({"weights": "w"}, 2, CapabilityFiles(gsm8k=str(file))))
    assert marks[0] != marks[1]
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        capability_fingerprint({}, 2, CapabilityFiles(advglue=str(tmp_path / "none.json")))


ADVGLUE_ROW = dict.fromkeys(("sentence", "question", "question1", "question2", "premise", "hypothesis"), "x")
ADVGLUE_ROW |= {"sentence1": "x", "sentence2": "x", "label": 0}
DEV = {task: [ADVGLUE_ROW] for task in ("sst2", "qqp", "mnli", "mnli-mm", "qnli", "rte")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k", '{"question": "1+1?", "answer": "2"}\n' * 5, "has 5 rows, expects 6 or more"),
        ("gsm8k", '{"q": "1+1?", "answer": "2"}\n' * 6, "row 1: has no column question; it has q, answer"),
        ("gsm8k", "{", "row 1: not valid JSON"),
        ("advglue", "{", "not valid JSON"),
        ("advglue", "[]", "under sst2"),
        ("advglue", json.dumps({"sst2": [ADVGLUE_ROW]}), "under qqp"),
        (
            "advglue",
            json.dumps(DEV | {"rte": [{"label": 0}]}),
            "row 1, key sentence1: expects a text",
        ),
        ("advglue", json.dumps(DEV | {"qnli": [ADVGLUE_ROW | {"label": 2}]}), "from 0 to 1"),
        ("advglue", json.dumps(DEV | {"mnli": [ADVGLUE_ROW | {"label": 3}]}), "from 0 to 2"),
    ],
)
def test_local_data_of_another_kind_are_refused_by_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        capability_fingerprint({}, 2, CapabilityFiles(**{name: str(file)}))
    assert str(error.value).startswith(str(file))


def test_the_harness_runs_our_tasks_over_its_templates(tmp_path: Path) -> None:
    """Every AdvGLUE task on two invented rows that have the columns of all of them."""
    columns = (
        "sentence",
        "question",
        "question1",
        "question2",
        "premise",
        "hypothesis",
        "sentence1",
        "sentence2",
    )
    rows = [{**{c: f"{c} {n}" for c in columns}, "label": n} for n in range(2)]
    file = tmp_path / "dev.json"
    tasks = ("sst2", "qqp", "mnli", "mnli-mm", "qnli", "rte")
    file.write_text(json.dumps(dict.fromkeys(tasks, rows)))
    found = run_capability("advglue", tiny_qwen2(), templated(), file=str(file))
    assert isinstance(found, Accuracies)
    assert set(found.tasks) == set(TASKS["advglue"])
    assert all(estimate.n == 2 for estimate in found.tasks.values())
    assert found.accuracy.n == 12


def test_data_that_cannot_be_had_are_not_a_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run_capability("advglue", tiny_qwen2(), byte_tokenizer(), file=str(tmp_path / "no.json"))
    assert isinstance(found, NotRun)
    assert "FileNotFoundError" in found.not_run
    assert list(asdict(found)) == [NOT_RUN]
