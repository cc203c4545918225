"""What the engine tells Ray Tune while variants run, from the files of a search."""

from __future__ import annotations

import pytest
from ray import cloudpickle
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

from bdpo.search.sweep import Sweep
from bdpo.storage.run_dir import RunDir
from bdpo.variants.ends import End, Failure
from pipelines.runtime.variant_actor import Names, Promotion, RecordLost, actor_resources
from tests.support.sweeps import configured, measured
from tune.trial import Trials


class Named:
    """Of Tune's trials these ask for the config alone."""

    def __init__(self, trial):
        self.config = {"variant": trial.name}


@pytest.fixture
def sweep(tmp_path):
    return Sweep(configured(num_samples=4, rungs=[0.5, 1.0]), RunDir(tmp_path), {})


def told(sweep, trial):
    return Promotion(Trials(sweep, None)).on_trial_result(None, Named(trial), {})


def test_below_half_of_those_before_it_stops(sweep):
    trials = [sweep.suggest() for _ in range(3)]
    said = []
    for trial, safety in zip(trials, (0.9, 0.2, 0.6), strict=True):
        sweep.record_rung(trial, 8, measured(safety))
        said.append(told(sweep, trial))
    # 0.2 < median(0.9); 0.6 >= median(0.9, 0.2)
    assert said == ["CONTINUE", "STOP", "CONTINUE"]
    assert [told(sweep, trial) for trial in trials] == said, "those that came later changed it"


def test_refusing_too_much_is_worse_than_any_safety(sweep):
    first, second = sweep.suggest(), sweep.suggest()
    sweep.record_rung(first, 8, measured(0.1))
    sweep.record_rung(second, 8, measured(1.0, compliance=0.5))
    assert [told(sweep, trial) for trial in (first, second)] == ["CONTINUE", "STOP"]


def test_open_trials_come_first_then_new_ones_and_each_once(sweep):
    done, stopped, failed = (sweep.suggest() for _ in range(3))
    for step in (8, 16):
        sweep.record_rung(sweep.trial(done.name), step, measured(0.9))
    sweep.record_rung(stopped, 8, measured(0.2))
    sweep.record_failure(failed.name, Failure(End("failed"), "why"))
    opened = sweep.suggest()
    more = configured(num_samples=6, rungs=[0.5, 1.0])
    raised = Sweep(more, sweep.run, {})
    names = Names(Trials(raised, None))
    given = [names.suggest(str(number)) for number in range(4)]
    assert given == [{"variant": opened.name}, {"variant": "0004"}, {"variant": "0005"}, Names.FINISHED]
    assert [trial.name for trial in raised.trials()] == [f"{n:04d}" for n in range(6)]


def test_a_variant_without_retries_left_is_lost_with_its_last_error(sweep, tmp_path):
    file = tmp_path / "error.pkl"
    file.write_bytes(cloudpickle.dumps(OSError(5, "I/O error")))
    for error_file, said in ((file, "OSError: [Errno 5] I/O error"), (None, "its process died")):
        trial = Named(sweep.suggest())
        trial.pickled_error_file, trial.num_failures = error_file, 3
        RecordLost(Trials(sweep, None)).on_trial_error(0, [], trial)
        assert sweep.trial(trial.config["variant"]).failure == Failure(End.LOST, f"3 times, at last {said}")


def test_processes_without_a_gpu_stay_on_the_head_by_the_resource_that_ray_gives_it():
    assert actor_resources(0.0) == {"CPU": 0, HEAD_NODE_RESOURCE_NAME: 0.001}
    assert actor_resources(0.5) == {"CPU": 0, "GPU": 0.5}  # the head of a cluster often has no GPU
