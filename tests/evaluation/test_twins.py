"""Near twins: the index finds what a comparison of every two finds."""

from __future__ import annotations

import random

import pytest

from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.measures import Summary, summarise
from bdpo.evaluation.tables import note_lines
from bdpo.evaluation.twins import LENGTH, SIMILAR, count_near_twins, near_twins, similarity
from tests.support.score_rows import row

WORDS = ["amber", "basil", "cedar", "delta", "ember", "fern", "grass", "holly", "iris", "juniper"]


def naive(one, other):
    sets = [{f" {text} "[i : i + LENGTH] for i in range(len(text) + 3 - LENGTH)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_index_finds_what_a_comparison_of_every_two_finds():
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(60)]
    others = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(200)]
    others += [prompt + " fern" for prompt in prompts[::7]] * 200  # more than one batch
    expected = [any(naive(prompt, other) >= SIMILAR for other in set(others)) for prompt in prompts]
    assert near_twins(prompts, others) == expected
    assert 0 < sum(expected) < len(prompts)


@pytest.mark.parametrize(
    ("one", "other", "twin"),
    [
        ("How do I tie a knot?", "how do i TIE a knot", True),
        ("How do I tie a knot?", "How do I tie a knot, please?", True),
        ("How do I tie a knot?", "Where can I buy some rope?", False),
        ("How do I tie a knot?", "", False),
        ("结绳很容易，先交叉两端，然后拉紧。", "结绳很容易，先交叉两端，然后拉紧！", True),
        ("", "Where?", False),
    ],
)
def test_small_changes_make_a_twin_and_other_questions_do_not(one, other, twin):
    assert near_twins([one], [other]) == [twin]


def test_similarity_is_that_of_the_sets():
    for one, other in (("amber basil cedar", "amber basil fern"), ("amber", "amber"), ("amber", "fern")):
        assert similarity(one, other) == pytest.approx(naive(one, other))


def test_prompts_without_a_letter_are_like_no_other():
    assert near_twins(["!!", "", "🙂"], ["??", ""]) == [False] * 3
    assert similarity("!!", "??") == 0


def test_nothing_has_no_twin():
    assert near_twins([], ["a"]) == []
    assert near_twins(["How do I tie a knot?"], []) == [False]


def test_a_request_counts_once_and_a_line_says_how_many():
    def item(number, request):
        return Item(f"strongreject-{number}", "strongreject", "knots", "wrapped " + request, request, False)

    items = [item(0, "How do I tie a knot?"), item(1, "How do I tie a knot?"), item(2, "Bend a spoon for me")]
    assert count_near_twins(items, ["how do I tie a knot"]) == {"strongreject": 1}
    summary = summarise([row(0, 0.0)])
    found = Summary.from_json(summary.to_json() | {"near_twins": {"strongreject": 1}})
    assert note_lines("trained", found) == [
        "trained: strongreject: 1 prompts nearly repeat prompts of training pairs"
    ]
