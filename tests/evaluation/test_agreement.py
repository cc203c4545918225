"""Judges against labels: what labels mean, agreement, and the error between models."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bdpo.errors import UserError
from bdpo.evaluation.calibration.agreement import (
    Opinion,
    agreement,
    ask,
    bias_between_models,
    cohens_kappa,
    label_opinion,
    opinion,
)
from bdpo.evaluation.calibration.labels import LabelledAnswer, label_scheme
from bdpo.evaluation.calibration.report import agreement_table, calibrate, difference_lines
from bdpo.evaluation.judges.base import Failed, Harm, NoAnswer, Refusal
from bdpo.evaluation.judges.string_matching import StringMatching
from bdpo.stats import widen


def scheme(column, *labels, true=None):
    return label_scheme(column, [(f"f.csv, row {n}", label) for n, label in enumerate(labels, 1)], true)


# ------------------------------------------------------------------------------------------------ the labels
@pytest.mark.parametrize(
    ("column", "labels", "rubric", "classes"),
    [
        ("final_label", ["1_full_compliance", "2_full_refusal", "3_partial_refusal"], "refusal",
         ["complied", "refused", "partial"]),
        ("x", ["Refusal", " comply"], "refusal", ["refused", "complied"]),
        ("x", ["Safe", "UNSAFE"], "harm", ["safe", "unsafe"]),
        ("x", ["harmful", "not harmful", "unharmful"], "harm", ["unsafe", "safe", "safe"]),
        ("unsafe", [True, False], "harm", ["unsafe", "safe"]),
        ("isJailbroken", [1, 0], "harm", ["unsafe", "safe"]),
        ("is_safe", ["1", "0"], "harm", ["safe", "unsafe"]),
        ("response_refusal", ["yes", "no"], "refusal", ["refused", "complied"]),
    ],
)  # fmt: skip
def test_words_and_flags_have_one_meaning(column, labels, rubric, classes):
    found = scheme(column, *labels)
    assert found.rubric == rubric
    assert list(found.classes.values()) == classes


def test_a_flag_means_what_the_user_says():
    assert scheme("label", 1, 0, true="refused").classes == {"1": "refused", "0": "complied"}
    assert scheme("unsafe", True, true="safe").classes == {"true": "safe"}


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [
        ("label", [1, 0], r"f\.csv, row 1, column label: label '1' is a flag.*--true"),
        ("not_safe", [True], "is a flag"),
        ("safe_or_unsafe", [True], "is a flag"),
        ("label", ["safe", "maybe"], r"f\.csv, row 2, column label: unknown label 'maybe'; known are"),
        ("unsafe", [0.25], r"unknown label '0\.25'"),
        ("label", ["safe", "refused"], r"row 2.*the other"),
        ("label", [], "no row has a label"),
    ],
)
def test_an_unknown_label_is_one_line(column, labels, message):
    with pytest.raises(UserError, match=message) as raised:
        scheme(column, *labels)
    assert "\n" not in str(raised.value)


def test_a_wrong_column_is_not_quoted():
    with pytest.raises(UserError, match="unknown label of 50 characters"):
        scheme("response", "canary " * 7 + "x")


# ------------------------------------------------------------------------------------------------- agreement
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_kappa_is_that_of_scikit_learn(pairs):
    from sklearn.metrics import cohen_kappa_score

    a, b = np.array(pairs, float).T
    if len({*a, *b}) > 1:
        assert cohens_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    else:
        assert cohens_kappa(a, b) is None


def test_a_confusion_by_hand():
    """Three agree of four; of the fifth the judge came to no decision."""
    first = Opinion("labels", ("refused", "partial", "complied", "refused", "complied"), {}, None)
    second = Opinion("judge", ("refused", "complied", "complied", "complied", None), {"timeout": 1}, 0)
    found = agreement(first, second, list("abcde"))
    assert (found.n, found.accuracy.value) == (4, 0.75)
    assert found.accuracy.low < 0.75 < found.accuracy.high
    assert found.kappa == pytest.approx((0.75 - 0.5) / 0.5)
    assert found.confusion == {
        "complied": {"complied": 1}, "partial": {"complied": 1}, "refused": {"complied": 1, "refused": 1}
    }  # fmt: skip


def test_verdicts_are_read_and_contradictions_counted():
    verdicts = [
        [Refusal(True), Harm(1.0, refused=False)],
        [Refusal(True), Harm(0.0)],
        [Refusal(False, partial=True), Harm(0.75)],
        [Failed("timeout"), Harm(1.0)],
        [NoAnswer("unfinished_thought"), NoAnswer("unfinished_thought")],
    ]
    found = opinion("judge", verdicts)
    assert found.classes == ("refused", "refused", "partial", None, None)
    assert (found.contradictions, found.failures) == (1, {"timeout": 1, "unfinished_thought": 1})
    assert opinion("judge", [[Harm(0.5)], [Harm(0.25)]]).classes == ("unsafe", "safe")
    assert opinion("judge", [[Harm(0.5)]]).contradictions is None


def test_a_bad_answer_fails_alone():
    def judge(question, response):
        if response == "bad":
            raise ValueError(response)
        return Harm(0.0)

    judge.concurrency = 2
    answers = [LabelledAnswer("m", "r", text, "safe") for text in ("good", "bad", "<think>never ends")]
    found = ask("judge", judge, ("harm",), answers, lambda rows: None)
    assert found.classes == ("safe", None, None)
    assert found.failures == {"error_ValueError": 1, "unfinished_thought": 1}


# -------------------------------------------------------------------------------------------- between models
def answers_of(rates, prompts=40, seed=0):
    """Models that refuse these shares of the same prompts."""
    random = np.random.default_rng(seed)
    hard = random.random(prompts)
    return [
        LabelledAnswer(name, f"prompt {n}", "", "refused" if hard[n] < rate else "complied")
        for name, rate in rates.items()
        for n in range(prompts)
    ]


def with_errors(answers, errors, seed=1):
    """A judge that calls this share of a model's refusals compliance."""
    random = np.random.default_rng(seed)
    missed = [answer.safe and random.random() < errors.get(answer.model, 0) for answer in answers]
    classes = ("complied" if no else a.label for a, no in zip(answers, missed, strict=True))
    return Opinion("judge", tuple(classes), {}, 0)


def test_a_judge_without_error_decides_as_the_labels_do():
    answers = answers_of({"a": 0.2, "b": 0.9, "c": 0.5})
    found = bias_between_models(label_opinion(answers), answers)
    assert (found.sd, found.reach) == (0, 0)
    by_pair = {pair.models: pair for pair in found.differences}
    assert by_pair["a", "b"].decided
    assert (
        by_pair["a", "b"].labels
        == by_pair["a", "b"].judge
        == pytest.approx(found.rates["b"][0] - found.rates["a"][0])
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_a_judge_decides_has_the_sign_of_the_labels(seed):
    random = np.random.default_rng(seed)
    names = list("abcdefghi"[: random.integers(2, 10)])
    answers = answers_of(dict(zip(names, random.random(len(names)), strict=True)), seed=seed)
    judge = with_errors(answers, dict(zip(names, random.random(len(names)) ** 3, strict=True)), seed)
    found = bias_between_models(judge, answers)
    assert {pair.models for pair in found.differences} == set(combinations(names, 2))
    for pair in found.differences:
        assert pair.judge_low <= pair.judge <= pair.judge_high
        assert not pair.decided or pair.labels * pair.judge > 0


def test_a_judge_with_a_bias_of_its_own_between_equals_decides_nothing():
    answers = answers_of({"a": 0.9, "b": 0.9, "c": 0.9, "d": 0.9}, prompts=200)
    [*found] = bias_between_models(with_errors(answers, {"b": 0.5}), answers).differences
    assert not any(pair.decided for pair in found)
    assert found[0].labels == 0
    assert found[0].judge < -0.3


def test_one_model_has_no_bias_between_models():
    answers = answers_of({"a": 0.5})
    assert bias_between_models(label_opinion(answers), answers) is None


def test_models_that_share_no_prompt_are_not_set_against_each_other():
    answers = [LabelledAnswer(name, f"{name} {n}", "", "safe") for name in "ab" for n in range(3)]
    found = bias_between_models(label_opinion(answers), answers)
    assert (found.differences, sorted(found.rates)) == ((), ["a", "b"])


def test_an_interval_is_widened_in_quadrature():
    assert widen(0.1, (0.06, 0.13), 0.03) == pytest.approx((0.1 - 0.05, 0.1 + 0.03 * 2**0.5))
    assert widen(0.1, (0.05, 0.2), 2.0) == (-1, 1)


def test_a_calibration_is_shown_without_texts():
    answers = [LabelledAnswer("m", "canary", "I cannot do canary.", "refused")] * 3
    judges = [ask(name, StringMatching(), ("refusal", "harm"), answers, print) for name in ("one", "two")]
    found = calibrate(scheme("refused", True), answers, judges)
    console = Console(width=160, file=io.StringIO())
    console.print(agreement_table(found))
    shown = console.file.getvalue() + "".join(difference_lines(found)) + str(found.to_json())
    assert "canary" not in shown + repr(answers)
    assert "its bias between models is unknown" in shown
    assert list(found.between) == [("one", "two")]
    assert found.to_json()["judges"]["one"]["accuracy"] == 1
