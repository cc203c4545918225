"""Searches as configs, and a sweep of two small trials as a command."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bdpo.config import parse_config
from bdpo.evaluation.benchmarks import strongreject, xstest
from bdpo.search.trials import Rung, Trial
from bdpo.stats import Estimate
from bdpo.variants.ends import Cause, End, Failure
from bdpo.variants.objective import Measured
from tests.support import ROOT
from tests.support.benchmark_files import write_csv
from tests.support.commands import start_alone
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl

PAIRS = 22

ALPHA, BETA = {"min": 0.5, "max": 3.0}, {"min": 0.02, "max": 0.5, "log": True}


def configured(seed=0, **tune):
    values = {"run_dir": "r", "model": {"name_or_path": "m"}, "data": {"path": "p"}, "seed": seed}
    tune = {"space": {"method.alpha": ALPHA, "method.beta": BETA}} | tune
    return parse_config({**values, "tune": tune}, "test")


def estimate(value, spread=0.1):
    return Estimate(value, max(0.0, value - spread), min(1.0, value + spread), 50, "exact")


def measured(safety, compliance=1.0, base=1.0, bound=0.05):
    return Measured(estimate(safety), estimate(compliance), base, round(base - bound - compliance, 12))


RATES = [1e30, 1e-3]  # the first cannot be trained with


def sweep_config(folder, chat, **evaluate):
    """A search over two learning rates, of three steps with two rungs, by two workers."""
    words = ("amber", "basil", "cedar", "delta", "ember", "fern")
    harmful = [["ab"[n % 2], "x", f"take the {word}"] for n, word in enumerate(words)]
    kinds = [("t", "safe"), ("u", "safe"), ("contrast_t", "unsafe"), ("contrast_u", "unsafe")]
    asked = [[str(n), f"plant the {words[n % 6]} {n}", *kinds[n % 4], "", ""] for n in range(12)]
    files = {
        "strongreject": {"path": str(write_csv(folder / "s.csv", [list(strongreject.COLUMNS), *harmful]))},
        "xstest": {"path": str(write_csv(folder / "x.csv", [list(xstest.COLUMNS), *asked]))},
    }
    config = tiny_config(
        folder / "run",
        save_model(folder / "model", chat),
        write_jsonl(folder / "pairs.jsonl", invented_pairs(PAIRS)),
        train={"workers": 2, "max_failures": 1, "save_steps": 50},
        evaluate={"held_out": ["b", "u", "contrast_u"], **files, **evaluate},
    )
    tune = {
        "space": {"train.learning_rate": RATES},
        "searcher": "grid",
        "rungs": [0.5, 1.0],
        "rung_limit": 2,
        "reduction_factor": 4.0,
    }
    return parse_config(config.model_dump() | {"tune": tune}, "test")


def start(folder, *arguments, **variables):
    counted = {"PYTHONPATH": f"{folder}:{ROOT}", "COUNTED": str(folder / "counted")}
    return start_alone(*arguments, **counted, **variables)


def wait_for(process, file):
    deadline = time.monotonic() + 900
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {file}")
        time.sleep(0.02)


NAN = Failure(End.FAILED, "FloatingPointError: NaN", Cause.NOT_FINITE)
NO_MEMORY = Failure(End.FAILED, "OutOfMemoryError: of CUDA")


def trial(number, *rungs, params=None, failure=None, before=()):
    """`rungs`: (safety, compliance, when); `before`: numbers of the trials that were there before it."""
    names = [f"{other:04d}" for other in before]
    reached = [Rung(8 * (i + 1), measured(s, c), when, before=names) for i, (s, c, when) in enumerate(rungs)]
    return Trial(f"{number:04d}", params or {"method.alpha": 1.0 + number / 8}, reached, failure)


def seven_trials_and_a_failed_one():
    rng = np.random.default_rng(0)
    done = [
        trial(
            n,
            *[(0.3 + 0.08 * n, 1 - 0.02 * n, 10.0 * n + r) for r in range(3)],
            params={"method.alpha": 0.5 + n / 4, "method.beta": float(0.02 * 25 ** rng.random())},
        )
        for n in range(7)
    ]
    failed = trial(7, params={"method.alpha": 3.0, "method.beta": 0.5}, failure=NAN)
    return [*done, failed]
