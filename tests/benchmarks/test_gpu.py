"""The command that measures on a GPU, as far as it can be seen without one: that its code runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import common
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, scoring
from benchmarks.gpu.record import Record, machine, peak_tflops, verdict
from benchmarks.gpu.setup import Setup


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path / "work", tmp_path / "out", machine(smoke=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert command.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_path_of_scoring_runs(setup):
    rows = [
        {"case": case, **row}
        for case in (scoring.FLEX, scoring.PLAIN, scoring.DRIFT)
        for row in scoring.measure(case, setup)
    ]
    pairs = setup.pairs(16)
    needed = sum(len(p.prompt) + 2 * len(p.chosen) + 2 * len(p.rejected) for p in pairs)
    assert {row["real_tokens"] for row in rows if "real_tokens" in row} == {needed}
    table = "\n".join(scoring.table(rows, setup.machine))
    assert all(case in table for case in (scoring.FLEX, scoring.PLAIN))


@pytest.mark.parametrize("dtype", correctness.DTYPES)
def test_shared_rows_are_within_the_stated_tolerances(setup, dtype):
    rows = list(correctness.measure(f"{dtype}, SDPA", setup))
    assert [row["what"].split(",")[0] for row in rows] == ["log-probs", "gradient"]
    assert any(row["value"] > 0 for row in rows)  # the two kinds of rows do not compute the same sums
    for row in rows:
        assert row["value"] <= row["tolerance"]


def test_rows_are_kept_until_the_case_or_the_machine_changes(tmp_path):
    file = tmp_path / "part.json"
    here = {"gpu": "H100", "date": "2026-01-01"}
    Record(file).on(here)
    Record(file).add({"case": "a", "value": 1})
    Record(file).add({"case": "b", "value": 2})
    Record(file).begin("b")
    Record(file).on(here | {"date": "2026-01-02"})
    assert json.loads(file.read_text())["rows"] == [{"case": "a", "value": 1}]
    Record(file).on(here | {"gpu": "H200"})
    assert Record(file).rows == []


def test_a_smoke_run_writes_no_results(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    record = Record(setup.out / "scoring.json")
    record.on(setup.machine)
    record.add({"case": scoring.VLLM, "why": "vLLM is not installed"})
    monkeypatch.setattr(sys, "argv", ["gpu", "--report", "scoring", "--out", str(setup.out)])
    assert command.main() == 0
    assert "vLLM is not installed" in capsys.readouterr().out
    assert not (tmp_path / "RESULTS.md").exists()
    record.on(setup.machine | {"smoke": False, "gpu": "NVIDIA H200"})
    assert command.main() == 0
    assert "NVIDIA H200" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_a_gpu(gpu, peak):
    assert peak_tflops(gpu) == peak


def test_verdicts():
    assert verdict("MFU", 41, 40, at_least=True).endswith("reached")
    assert verdict("ratio", 0.7, 0.6).endswith("missed")
    assert "not measured" in verdict("ratio", None, 0.6)
