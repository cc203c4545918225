"""The engine of experiments and searches under Ray Tune, with variants that train nothing."""

from __future__ import annotations

import pytest

from pipelines.runtime.variant_protocol import Limits
from pipelines.runtime.variants import run_variants
from tests.support.stalling import StallingVariants

pytestmark = pytest.mark.ray


def test_a_variant_whose_process_stands_still_while_it_evaluates_is_run_again(tmp_path, capsys):
    variants = StallingVariants(tmp_path)
    run_variants(variants, tmp_path, 2, Limits(concurrent=1, max_failures=1, stall_seconds=0.5))
    stalled = int((tmp_path / "stalled").read_text())
    shown = capsys.readouterr().out
    assert f"worker {stalled} on " in shown
    assert "stands still: the shard of rows 0 to 7 has taken" in shown
    assert {file.name for file in tmp_path.glob("*.done")} == {"first.done", "second.done"}
    assert not list(tmp_path.glob("*.failed"))
