"""What --inspect says of finished scores: numbers by a formula of the test's own, from the folder alone."""

import json
import statistics
import sys

import pyarrow as pa
import pytest
from helpers import tiny_config
from rich.console import Console

from bdpo.config import MethodConfig
from bdpo.mi_report import QUANTILES, mi_imbalance, mi_summary
from bdpo.runs import RunDir, write_manifest
from bdpo.scoring import SCORE_SCHEMA, score_store
from pipelines import cli, score

MI = {
    "safe": ([-0.5, 0.0, 0.004, 0.02, 1.0], [0.1, 0.2, 0.3, -0.4, 0.5]),
    "unsafe": ([0.25, 0.75], [0.25, 0.5]),
}
FINGERPRINT = {"dtype": "float32", "unconditional": "bos", "max_length": 64, "weights": "0123456789abcdef"}
WORKERS = {
    "a:1": {"pairs": 4, "tokens": 1000, "tokens_forwarded": 1100, "seconds": 2.0},
    "b:2": {"pairs": 3, "tokens": 500, "tokens_forwarded": 700, "seconds": 2.0},
}


@pytest.fixture
def scores():
    rows = [
        dict.fromkeys(SCORE_SCHEMA.names, 1)
        | {"pair_id": f"{group}{i}", "group": group, "mi_chosen": chosen, "mi_rejected": rejected}
        for group, sides in MI.items()
        for i, (chosen, rejected) in enumerate(zip(*sides, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)


def test_the_distribution_of_every_group(scores):
    safe, unsafe = mi_summary(scores, MethodConfig(mi_floor=0.01))
    assert (safe["group"], unsafe["group"]) == tuple(MI)
    for row in (safe, unsafe):
        sides = dict(zip(("chosen", "rejected"), MI[row["group"]], strict=True))
        for side, values in sides.items():
            ranks = [q * (len(values) - 1) for q in QUANTILES]
            ordered = sorted(values)
            between = [
                ordered[int(rank)]
                + (rank % 1) * (ordered[min(int(rank) + 1, len(values) - 1)] - ordered[int(rank)])
                for rank in ranks
            ]
            assert row[side]["mean"] == pytest.approx(statistics.mean(values), abs=1e-6)
            assert row[side]["quantiles"] == pytest.approx(between, abs=1e-6)
    assert safe["chosen"]["negative"] == 1 / 5
    assert safe["chosen"]["floored"] == 3 / 5
    assert safe["rejected"]["floored"] == 1 / 5
    assert safe["chosen_better"] == 2 / 5  # 0.02 over -0.4, 1.0 over 0.5
    assert unsafe["chosen_better"] == 1 / 2  # equal is not better


def test_which_response_is_better_understood(scores):
    safe, unsafe = mi_imbalance(scores)
    differences = [chosen - rejected for chosen, rejected in zip(*MI["safe"], strict=True)]
    assert safe["difference"] == pytest.approx(statistics.mean(differences))
    assert safe["apart"] == pytest.approx(statistics.median(map(abs, differences)))
    half = 2.776445 * statistics.stdev(differences) / 5**0.5
    assert (safe["low"], safe["high"]) == pytest.approx(
        (safe["difference"] - half, safe["difference"] + half), rel=1e-5
    )
    assert (safe["chosen_better"], unsafe["chosen_better"]) == (2 / 5, 1 / 2)
    assert safe["chosen_better_low"] < 2 / 5 < safe["chosen_better_high"]


@pytest.fixture
def run(tmp_path, scores):
    """A finished run folder whose model and data are gone."""
    run = RunDir(tmp_path / "run")
    config = tiny_config(run.root, tmp_path / "gone", tmp_path / "gone.jsonl")
    run.open(config).release()
    score_store(run, FINGERPRINT).write(0, scores.replace_schema_metadata({"bdpo.work": "{}"}))
    manifest = {"rows": scores.num_rows, "seconds": 1.0, "workers": WORKERS}
    write_manifest(run.scores / "manifest.json", FINGERPRINT, **manifest)
    return run


def inspect(run, monkeypatch):
    """`python -m pipelines.score --config FILE --inspect` on a terminal of 80 columns: exit code."""
    monkeypatch.setattr(sys, "argv", ["score", "--config", str(run.config), "--inspect"])
    monkeypatch.setattr(score, "console", Console(width=80))
    monkeypatch.setattr(cli, "connect", lambda: pytest.fail("no cluster is needed"))
    try:
        cli.main(score.run_score, "", lambda run: [], inspect=score.show_scores)
    except SystemExit as end:
        return end.code
    return 0


def test_inspect_shows_every_group_and_every_actor(run, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in run.root.rglob("*")}
    assert inspect(run, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "safe queries: 5 pairs, chosen better understood in 40%" in shown
    assert "unsafe queries: 2 pairs, chosen better understood in 50%" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["a:1", "4", "1,000", "2.0", "s", "500", "1.100"] in lines
    assert ["b:2", "3", "500", "2.0", "s", "250", "1.400"] in lines
    assert ["all", "7", "1,500", "4.0", "s", "375", "1.200"] in lines
    chosen = next(line for line in lines if line[:1] == ["chosen"])
    assert chosen[1:9] == ["0.105", "-0.400", "0.000", "0.004", "0.020", "0.804", "20%", "60%"]
    assert "…" not in shown
    assert before == {file: file.stat().st_mtime_ns for file in run.root.rglob("*")}


def test_inspect_of_unfinished_scores_is_refused(run, monkeypatch, capsys):
    (run.scores / "manifest.json").unlink()
    assert inspect(run, monkeypatch) == 2
    assert "no finished scores" in capsys.readouterr().err


def test_inspect_of_a_folder_that_lost_a_shard_is_refused(run, monkeypatch, capsys):
    next(run.scores.glob("part-*")).unlink()
    assert inspect(run, monkeypatch) == 2
    assert json.loads((run.scores / "manifest.json").read_text())["rows"] == 7
