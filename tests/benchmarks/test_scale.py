"""The simulated runs of `benchmarks.scale`, small: what is counted is known beforehand."""

from __future__ import annotations

import pytest

from bdpo.cluster.status import count_shards
from bdpo.storage.run_dir import RunDir
from benchmarks import scale, scale_training
from benchmarks.counting_bucket import Bucket, counted, new_bucket
from benchmarks.simulated import QUICK, Machines, SimulatedPool, SimulatedScore, Trainers, config_of, trained


def test_requests_of_the_driver_are_a_list_and_one_a_shard():
    done, _ = scale.driver(10_000, 512)
    missing, status, check, read, plan = (one.requests for one in done)
    shards = 20
    assert (missing, status, plan) == (shards + 1, shards + 1, 0)
    assert read == shards + 2  # the manifest that the check at the end wrote
    assert done[0].in_a_row == 1 + shards / 32
    # Two lists and the manifest; of each of three parts of pairs its size and ranges of it, 32 at a time.
    assert done[2].in_a_row == 3 + (check - 3) / 32


def test_a_list_of_more_than_a_thousand_objects_takes_two_requests():
    folder = new_bucket() / "many"
    for number in range(1001):
        folder.fs.link((folder / f"{number}").path, b"")
    with counted() as found:
        assert len(folder.fs.ls(folder.path)) == 1001
        assert folder.fs.find(folder.path, prefix="1000") == ["bucket/many/1000"]
    assert (found.requests, found.in_a_row) == (3, 3)


@pytest.mark.parametrize("stop_at", [float("inf"), 200])
def test_every_pair_is_scored_whatever_is_lost(stop_at):
    new_bucket()
    pairs, machines = 100_000, Machines(16, 0.01, pairs_per_second=20, hours_between_losses=0.05)
    config = config_of(score={"shard_rows": 256, "workers": 16})
    run, pool = RunDir(config.run_dir), SimulatedPool(machines, stop_at=stop_at)
    done = SimulatedScore(config, run, pool, pairs).score()
    assert count_shards(run.scores) == (-(-pairs // 256), pairs)
    assert done.losses > 0
    assert done.lost > 0
    assert done.useful == pytest.approx(pairs / 20, rel=0.02)
    assert done.useful + done.lost < 16 * done.seconds
    assert Bucket.requests > 3 * pairs // 256  # each shard is asked for, written and read


def test_a_training_without_losses_takes_its_steps_and_checkpoints():
    undisturbed = trained(Trainers(4, 2.0, 30.0, hours_between_losses=1e9, start_seconds=60), 100, 40)
    assert (undisturbed.useful, undisturbed.lost, undisturbed.losses) == (200, 0, 0)
    assert undisturbed.seconds == 60 + 200 + 3 * 30
    disturbed = trained(Trainers(4, 2.0, 30.0, hours_between_losses=0.2, start_seconds=60), 100, 40)
    assert disturbed.useful == 200
    assert disturbed.seconds == pytest.approx(
        200 + 3 * 30 + disturbed.lost + 60 * (1 + disturbed.losses), abs=30 * disturbed.losses
    )


def test_every_trial_of_a_sweep_ends():
    decisions, ends = scale.sweep(20)
    assert ends.total() == 20
    assert set(ends) <= {"completed", "stopped"}
    assert len(decisions) > 4 * 20


def test_a_decision_reads_every_trial_once():
    """Of each its parameters, its failure, the list of its rungs and two rungs; before that a list of all."""
    missing, suggested, *_ = scale.grown(8)
    assert missing.requests == 1 + 7 * 5
    assert suggested.requests == 1 + 7 * 5 + 1


def test_the_table_of_dealing_has_a_row_for_each_size():
    rows, _ = scale_training.dealing(QUICK)
    assert len(rows) == len(QUICK.ranks)
    assert rows[0].startswith("| 2 | 8 | 1.0")
