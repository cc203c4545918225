"""Several answers to each prompt: a rate over answers, of which the prompts are the clusters."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bdpo.config import EvaluateConfig
from bdpo.evaluation.answers import items_digest
from bdpo.evaluation.benchmarks.registry import load_items
from bdpo.evaluation.engines.base import Sampling
from bdpo.evaluation.measures import summarise
from tests.support.benchmark_files import STRONGREJECT, write_csv
from tests.support.score_rows import row


@pytest.fixture
def values(tmp_path):
    file = write_csv(tmp_path / "s.csv", STRONGREJECT)
    return {"benchmarks": ["strongreject"], "strongreject": {"path": str(file)}, "temperature": 1.0}


def test_each_prompt_is_asked_so_often_and_is_a_cluster(values):
    once, thrice = (load_items(EvaluateConfig(**values, samples=n, limit=2)) for n in (1, 3))
    assert [item.item_id for item in thrice[:3]] == [
        "strongreject-0001",
        "strongreject-0001-sample2",
        "strongreject-0001-sample3",
    ]
    assert [item.cluster for item in thrice] == [item.item_id for item in once for _ in range(3)]
    assert [item.prompt for item in thrice] == [item.prompt for item in once for _ in range(3)]
    assert items_digest(once) != items_digest(thrice)


def test_the_first_sample_is_that_of_a_single_one_and_the_others_differ():
    single, several = Sampling(1.0, seed=7), Sampling(1.0, seed=7, draws=[0, 1, 2, 1])
    prompts = [[1, 2]] * 4
    assert single.seeds(prompts)[0] == several.seeds(prompts)[0]
    assert len(set(several.seeds(prompts))) == 3


def test_a_greedy_answer_is_not_asked_for_twice(values):
    with pytest.raises(ValidationError, match="samples=2 requires a temperature above 0"):
        EvaluateConfig(**values | {"temperature": 0.0, "samples": 2})


def test_ten_equal_answers_to_a_prompt_are_no_more_evidence_than_one():
    alone = [row(n, float(n % 2)) for n in range(12)]
    sampled = [
        row(100 * n + sample, float(n % 2), cluster=f"p{n}") for n in range(12) for sample in range(10)
    ]
    one, ten = (summarise(rows).estimate("strongreject.safety") for rows in (alone, sampled))
    assert (one.value, ten.value, ten.n, ten.clusters) == (0.5, 0.5, 120, 12)
    assert ten.high - ten.low > 0.9 * (one.high - one.low)
