"""How many trials nodes hold: shares of a GPU lie on one GPU, workers on one node."""

from __future__ import annotations

import pytest

from bdpo.cluster.placement import max_concurrent
from bdpo.config import load_config, parse_config
from bdpo.errors import UserError
from bdpo.search.space import number_of_trials
from tests.support import ROOT
from tests.support.sweeps import configured

CONFIGS = ROOT / "pipelines" / "configs"

H100 = {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}

L40S = {"CPU": 16, "GPU": 1, "accelerator_type:L40S": 1}


def needing(workers, gpus=0.0, share=0.0, accelerator=None, **tune):
    """A search whose trials have so many workers of `gpus` each, and evaluate with a share of a GPU."""
    config = configured(**tune).model_dump()
    config["train"] |= {"workers": workers, "gpus_per_worker": gpus, "accelerator_type": accelerator}
    config["evaluate"] |= {"gpus_per_worker": share}
    return parse_config(config, "test")


def concurrent_trials(config, nodes):
    todo, share = number_of_trials(config), config.evaluate.gpus_per_worker
    return max_concurrent(config, nodes, todo, "tune.max_concurrent_trials", share)


@pytest.mark.parametrize(
    ("needs", "nodes", "fit"),
    [
        ((2,), [(1, {"CPU": 4})], 2),
        ((2,), [(1, {"CPU": 3})], 1),  # one short of two trials
        ((3,), [(2, {"CPU": 2})], 1),
        ((1, 0.5, 0.5), [(1, {"CPU": 16, "GPU": 2})], 2),
        ((8, 0.9, 0.1), [(1, {"CPU": 96, "GPU": 8})], 1),
        ((1, 0.1, 0.2), [(1, {"CPU": 9, "GPU": 0.9})], 3),
        ((1, 0.9, 0.1), [(1, {"CPU": 9, "GPU": 3})], 2),  # both evaluations lie on one GPU
        ((1, 0.6, 0.4), [(1, {"CPU": 9, "GPU": 2})], 1),  # so they do here
        ((2, 2.0, 1.0), [(1, {"CPU": 9, "GPU": 8})], 1),
        ((4, 1.0, 1.0), [(5, {"CPU": 4, "GPU": 1})], 1),
        ((8, 1.0, 1.0, "H100"), [(2, H100), (8, L40S)], 1),
        ((8, 1.0, 1.0, "H100"), [(8, L40S), (2, H100)], 1),
        ((8, 1.0, 1.0, "L40S"), [(1, H100), (16, L40S)], 2),
        ((1,), [(100, {"CPU": 100})], 16),  # no more than there are
    ],
)
def test_what_fits(needs, nodes, fit):
    assert concurrent_trials(needing(*needs), nodes) == fit


@pytest.mark.parametrize(
    ("needs", "nodes", "said"),
    [
        ((2,), [(1, {"CPU": 1})], r"requires 2 CPU \(train.workers=2 x 1\); .* cluster of 1 x \(1 CPU\);"),
        (
            (4, 1.0, 1.0),
            [(1, {"CPU": 9, "GPU": 4})],
            r"and 5 GPU \(train.workers=4 x 1 \+ evaluate.gpus_per_worker=1\); .* 1 x \(9 CPU, 4 GPU\);",
        ),
        # 2 GPUs are there and needed: after the evaluation's 0.6 only one of them has room for a worker.
        ((2, 0.7, 0.6), [(1, {"CPU": 9, "GPU": 2})], r"and 2 GPU \(train.workers=2 x 0.7 \+ .*=0.6\), each"),
        ((1, 0.6), [(2, {"CPU": 9, "GPU": 0.5})], r"0.6 GPU .* 2 x \(9 CPU, 0.5 GPU\);"),
        (
            (1, 1.0, 0.0, "A100"),
            [(2, H100), (8, L40S)],
            r"1 on A100\); .* 2 x \(192 CPU, 8 GPU, H100\) \+ 8 x",
        ),
        ((1,), [(1, {})], r"1 x \(nothing\)"),
    ],
)
def test_too_small_is_said_with_the_arithmetic(needs, nodes, said):
    with pytest.raises(UserError, match=said) as refused:
        concurrent_trials(needing(*needs), nodes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*-7b*.yaml")), ids=lambda file: file.stem)
def test_an_experiment_of_every_7b_preset_fits_the_gpus_that_the_preset_is_for(file):
    """An arm trains on all of them, and is evaluated on one of them afterwards."""
    config = load_config(str(file), [])
    gpus = config.train.workers * config.train.gpus_per_worker
    assert max_concurrent(config, [(1, {"CPU": 192, "GPU": gpus})], 5, "experiment.max_concurrent_arms") == 1
    assert max_concurrent(config, [(2, {"CPU": 192, "GPU": gpus})], 5, "experiment.max_concurrent_arms") == 2
    with pytest.raises(UserError, match=r"^experiment: one training requires"):
        max_concurrent(config, [(1, {"CPU": 192, "GPU": gpus - 1})], 5, "experiment.max_concurrent_arms")


def test_not_more_than_the_config_says():
    assert concurrent_trials(needing(1, max_concurrent_trials=2), [(1, {"CPU": 8})]) == 2


def test_of_nodes_that_cannot_be_known_the_config_says_it():
    assert concurrent_trials(needing(8, 1.0, 1.0, max_concurrent_trials=3), None) == 3
    with pytest.raises(UserError, match=r"^tune\.max_concurrent_trials: set it"):
        concurrent_trials(needing(8, 1.0, 1.0), None)


def test_trainings_beside_each_other_have_a_fixed_number_of_workers():
    with pytest.raises(UserError, match=r"^train\.workers=\[1, 2\]: the trainings of a search"):
        concurrent_trials(needing([1, 2]), [(1, {"CPU": 4})])
