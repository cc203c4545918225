"""Scoring whose driver, actor and node are killed."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT


def test_a_killed_driver_actor_and_node_cost_at_most_what_was_in_flight():
    """The script of thirty kills, with one of each kind; it compares with scores made without Ray."""
    command = [sys.executable, "-m", "tests.system.kill_scoring", "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recovered 3, rows lost 0, rows duplicated 0, scores changed 0" in done.stdout
