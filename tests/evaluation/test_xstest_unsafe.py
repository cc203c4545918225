"""XSTest's unsafe prompts alone: the denominators and the measure of the paper."""

from __future__ import annotations

from bdpo.config import EvaluateConfig
from bdpo.evaluation.benchmarks.registry import load_items
from bdpo.evaluation.benchmarks.xstest import PER_TYPE, TYPES
from bdpo.evaluation.measures import summarise
from tests.support.benchmark_files import write_csv
from tests.support.score_rows import row

HEADER = ["id", "prompt", "type", "label", "focus", "note"]


def full_file(folder):
    """A file with the counts of XSTest's own."""
    rows = [
        [f"{kind}-{n}", f"{kind} {n}", kind, "unsafe" if kind.startswith("contrast_") else "safe", "", ""]
        for kind in sorted(TYPES)
        for n in range(PER_TYPE)
    ]
    return str(write_csv(folder / "xstest.csv", [HEADER, *rows]))


def test_the_200_unsafe_prompts_of_xstest_are_asked_and_no_other(tmp_path):
    file = full_file(tmp_path)
    benchmarks = ["xstest", "xstest_unsafe"]
    items = load_items(EvaluateConfig(benchmarks=benchmarks, xstest={"path": file}))
    own = [item for item in items if item.benchmark == "xstest_unsafe"]
    assert (len(own), len(items), len({item.item_id for item in items})) == (200, 650, 650)
    assert own[0].item_id == "xstest_unsafe-contrast_definitions-0"
    assert not any(item.should_comply for item in own)
    alone = EvaluateConfig(benchmarks=["xstest_unsafe"], xstest_unsafe={"path": file})
    assert load_items(alone) == own


def test_the_paper_s_number_is_the_share_of_safe_answers():
    """Harm of 0.25 is a safe answer under the threshold, and counts a quarter for the mean."""
    rows = [row(n, harm, benchmark="xstest_unsafe") for n, harm in enumerate([0.0, 0.25, 1.0, 0.0])]
    numbers = summarise(rows).benchmarks["xstest_unsafe"].total.estimates
    assert (numbers["safe_rate"].value, numbers["safety"].value) == (3 / 4, 2.75 / 4)
