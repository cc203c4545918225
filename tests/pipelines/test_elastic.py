"""Which moments Ray Train may choose for another number of workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2.api.config import ScalingConfig

from pipelines.runtime.ray_internals.elastic import CheckpointScalingPolicy

SAVED, LOGGED = SimpleNamespace(checkpoint="folder"), SimpleNamespace(checkpoint=None)


@pytest.fixture
def policy(monkeypatch):
    """The policy, whose base considers every time that it is asked."""
    asked = "make_decision_for_running_worker_group"
    monkeypatch.setattr(ElasticScalingPolicy, asked, lambda *_: "considered")
    monkeypatch.setattr(ElasticScalingPolicy, "_maybe_send_resource_request", lambda self: None)
    return CheckpointScalingPolicy(ScalingConfig(num_workers=(1, 3)))


def polled(policy, *reports, start=1.0):
    workers = {rank: SimpleNamespace(training_report=report) for rank, report in enumerate(reports)}
    status = SimpleNamespace(worker_statuses=workers)
    decision = policy.make_decision_for_running_worker_group(SimpleNamespace(start_time=start), status)
    return not isinstance(decision, NoopDecision)


def test_it_considers_when_the_last_worker_has_saved(policy):
    moments = [
        ((None, None), False),
        ((LOGGED, LOGGED), False),
        ((SAVED, None), False),
        ((SAVED, None), False),  # its second
        ((None, SAVED), True),  # now both have saved the first
        ((None, None), False),
        ((None, SAVED), True),
        ((SAVED, SAVED), True),
    ]
    for reports, considered in moments:
        assert polled(policy, *reports) == considered


def test_a_new_group_of_workers_begins_to_count_anew(policy):
    assert not polled(policy, SAVED, None, start=1.0)
    assert not polled(policy, None, SAVED, None, start=2.0)
    assert not polled(policy, SAVED, None, None, start=2.0)
    assert polled(policy, None, None, SAVED, start=2.0)
