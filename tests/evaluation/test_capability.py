from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bdpo.evaluation.capability import (
    ADVGLUE,
    BENCHMARKS,
    NOT_RUN,
    Accuracies,
    NotRun,
    accuracies,
    run_capability,
)
from bdpo.stats import rate
from tests.support.chats import CHATML, byte_tokenizer
from tests.support.helpers import tiny_qwen2

pytestmark = pytest.mark.long


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
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = "</s>"
    data = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
    }
    found = run_capability("advglue", tiny_qwen2(), tokenizer, data=data)
    assert isinstance(found, Accuracies)
    assert set(found.tasks) == set(BENCHMARKS["advglue"])
    assert all(estimate.n == 2 for estimate in found.tasks.values())
    assert found.accuracy.n == 12


def test_data_that_cannot_be_had_are_not_a_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": str(tmp_path / "no.jsonl")},
    }
    found = run_capability("advglue", tiny_qwen2(), byte_tokenizer(), data=missing)
    assert isinstance(found, NotRun)
    assert "FileNotFoundError" in found.not_run
    assert list(asdict(found)) == [NOT_RUN]
