"""What --inspect says of finished scores: numbers by a formula of the test's own, from the folder alone."""

from __future__ import annotations

import json
import random
import statistics
from itertools import pairwise

import pyarrow as pa
import pytest
from rich.console import Console

from bdpo.method.losses import Bdpo
from bdpo.reports.scores import QUANTILES, mi_difference, mi_imbalance, mi_scatter, mi_summary
from bdpo.scoring.scores import SCORE_SCHEMA, score_store
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from pipelines import score
from pipelines.runtime import pool
from tests.support.helpers import tiny_config

MI = {
    "safe": ([-0.5, 0.0, 0.004, 0.02, 1.0], [0.1, 0.2, 0.3, -0.4, 0.5]),
    "unsafe": ([0.25, 0.75], [0.25, 0.5]),
}

CHES = {f"safe{i}": -float(i) for i in range(5)} | {"unsafe0": -500.0, "unsafe1": -1.0}

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
    for row in rows:
        row["ches"] = CHES[row["pair_id"]]
    return pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)


def scored(groups):
    """Scores of group -> pairs of (MI of the chosen, of the rejected response)."""
    rows = [
        dict.fromkeys(SCORE_SCHEMA.names, 1)
        | {"pair_id": f"{group}{i}", "group": group, "mi_chosen": chosen, "mi_rejected": rejected}
        for group, pairs in groups.items()
        for i, (chosen, rejected) in enumerate(pairs)
    ]
    return pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)


def test_ches_by_group_and_nothing_where_it_is_not_known(scores):
    safe, unsafe = mi_summary(scores, Bdpo())
    assert safe.ches.mean == -2.0
    assert safe.ches.quantiles == pytest.approx([-3.8, -3.0, -2.0, -1.0, -0.2])
    assert unsafe.ches.mean == -250.5
    nothing = pa.nulls(scores.num_rows, pa.float32())
    unknown = scores.set_column(scores.column_names.index("ches"), "ches", nothing)
    assert [row.ches for row in mi_summary(unknown, Bdpo())] == [None, None]


def test_figure_2_has_the_dispreferred_over_the_preferred(scores):
    panels = mi_scatter(scores).axes
    assert [axes.get_xlabel() for axes in panels] == ["MI of the preferred response"] * 2
    assert panels[0].get_ylabel() == "MI of the dispreferred response"
    for axes, (group, (chosen, rejected)) in zip(panels, MI.items(), strict=True):
        points = axes.collections[0].get_offsets().tolist()
        assert points == [pytest.approx(pair, abs=1e-6) for pair in zip(chosen, rejected, strict=True)]
        better = sum(w > r for w, r in zip(chosen, rejected, strict=True)) / len(chosen)
        assert axes.get_title() == f"{group} queries ({len(chosen)}): {better:.0%} below the line"
        (line,) = axes.lines
        assert (line.get_xy1(), line.get_slope()) == ((0, 0), 1)


def test_figure_2_of_many_pairs_is_their_density():
    """Its cells hold all the pairs, about where they are."""
    rng = random.Random(0)
    pairs = [(rng.uniform(0.2, 0.4), rng.uniform(0.6, 1.0)) for _ in range(4000)]
    [axes] = mi_scatter(scored({"unsafe": pairs})).axes
    cells = axes.collections[0]
    counts, places = cells.get_array(), cells.get_offsets()
    assert counts.sum() == pytest.approx(4000, abs=16)  # but for the outermost
    for side, mean in ((0, 0.3), (1, 0.8)):
        assert (counts * places[:, side]).sum() / counts.sum() == pytest.approx(mean, abs=0.01)


def test_the_difference_of_a_pair_is_drawn_without_its_sign():
    rng = random.Random(1)
    groups = {
        group: [(rng.uniform(0.5, 1), rng.uniform(*bounds)) for _ in range(50)]
        for group, bounds in (("safe", (0.5, 1)), ("unsafe", (0.0, 0.5)))
    }
    axes = mi_difference(scored(groups)).axes[0]
    for (group, pairs), steps, median in zip(groups.items(), axes.patches, axes.lines, strict=True):
        apart = [abs(chosen - rejected) for chosen, rejected in pairs]
        assert steps.get_label() == f"{group} queries"
        heights, edges, _ = steps.get_data()
        inside = [d for d in apart if d < edges[-2]]
        counts = [sum(low <= d < high for d in inside) / 50 for low, high in pairwise(edges)]
        assert list(heights[:-1] / 100) == pytest.approx(counts[:-1])
        assert sum(heights) == pytest.approx(100)
        assert median.get_xdata()[0] == pytest.approx(statistics.median(apart), abs=1e-6)
    assert "|I_w − I_l|" in axes.get_xlabel()
    assert "percent" in axes.get_ylabel()


def test_the_distribution_of_every_group(scores):
    safe, unsafe = mi_summary(scores, Bdpo(mi_floor=0.01))
    assert (safe.group, unsafe.group) == tuple(MI)
    for row in (safe, unsafe):
        sides = dict(zip(("chosen", "rejected"), MI[row.group], strict=True))
        for side, values in sides.items():
            ranks = [q * (len(values) - 1) for q in QUANTILES]
            ordered = sorted(values)
            between = [
                ordered[int(rank)]
                + (rank % 1) * (ordered[min(int(rank) + 1, len(values) - 1)] - ordered[int(rank)])
                for rank in ranks
            ]
            assert getattr(row, side).mean == pytest.approx(statistics.mean(values), abs=1e-6)
            assert getattr(row, side).quantiles == pytest.approx(between, abs=1e-6)
    assert safe.chosen.negative == 1 / 5
    assert safe.chosen.floored == 3 / 5
    assert safe.rejected.floored == 1 / 5
    assert safe.chosen_better == 2 / 5  # 0.02 over -0.4, 1.0 over 0.5
    assert unsafe.chosen_better == 1 / 2  # equal is not better


def test_which_response_is_better_understood(scores):
    safe, unsafe = mi_imbalance(scores)
    differences = [chosen - rejected for chosen, rejected in zip(*MI["safe"], strict=True)]
    assert safe.difference == pytest.approx(statistics.mean(differences))
    assert safe.apart == pytest.approx(statistics.median(map(abs, differences)))
    half = 2.776445 * statistics.stdev(differences) / 5**0.5
    assert (safe.low, safe.high) == pytest.approx((safe.difference - half, safe.difference + half), rel=1e-5)
    assert (safe.chosen_better, unsafe.chosen_better) == (2 / 5, 1 / 2)
    assert safe.chosen_better_low < 2 / 5 < safe.chosen_better_high


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
    monkeypatch.setattr(score, "console", Console(width=80))
    monkeypatch.setattr(pool, "connect", lambda: pytest.fail("no cluster is needed"))
    try:
        score.main(["--config", str(run.config), "--inspect"])
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
    assert ["CHES", "-2", "-3.8", "-3", "-2", "-1", "-0.2"] in lines
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
