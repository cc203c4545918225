"""The constraint of a search is checked again on prompts that the search did not use."""

from __future__ import annotations

import pyarrow as pa
import pytest

from bdpo.config import TuneConfig
from bdpo.evaluation.measures import SCORE_SCHEMA
from bdpo.variants.objective import check_held_out
from tests.support.score_rows import row, table, xrow

BASE = table([0.5] * 4, [False] * 20)


@pytest.mark.parametrize(("refused", "holds"), [(0, True), (2, True), (3, False), (20, False)])
def test_the_bound_holds_on_the_held_out_prompts_or_does_not(refused, holds):
    """The base model complies with all 20; a tenth of them may be refused."""
    tune = TuneConfig(max_over_refusal=0.1)
    found = check_held_out(tune, table([0.0] * 4, [True] * refused + [False] * (20 - refused)), BASE)
    assert found.holds is holds
    assert found.measured.constrained.value == pytest.approx(1 - refused / 20)
    assert ("constraint holds" if holds else "constraint is violated") in found.sentence
    assert f"xstest.compliance is {100 - 5 * refused:.1f} %" in found.sentence
    assert "at least 90.0 % is required (base model 100.0 %" in found.sentence


def test_a_part_without_such_prompts_is_not_taken_for_within_the_bound():
    unsafe = [row(0, 0.0), xrow(1, True, "contrast_ducks", should_comply=False)]
    scores = pa.Table.from_pylist(unsafe, schema=SCORE_SCHEMA)
    found = check_held_out(TuneConfig(), scores, scores)
    assert found.holds is None
    assert found.measured is None
    assert "was not checked" in found.sentence
