"""Judges against labels: what labels mean, agreement, and the error between models."""

from __future__ import annotations

import io
import subprocess
import sys
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
    cohens_kappa,
    label_opinion,
    opinion,
)
from bdpo.evaluation.calibration.bias import TOO_SMALL, bias_between_models
from bdpo.evaluation.calibration.labels import LabelledAnswer, label_scheme
from bdpo.evaluation.calibration.report import agreement_table, bias_table, calibrate, difference_lines
from bdpo.evaluation.judges.base import Failed, Harm, NoAnswer, Refusal
from bdpo.evaluation.judges.string_matching import StringMatching
from bdpo.stats import widen
from tests.support import ROOT


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
        ("jailbroken_llama_guard1", [True, False], "harm", ["unsafe", "safe"]),
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
        ("isntSafe", [True], "is a flag"),
        ("jailbreak_blocked", [True], "is a flag"),
        ("prompt_harmful", [True], "is a flag"),
        ("refusal_incorrect", [True], "is a flag"),
        ("jailbreak", [True], "is a flag"),
        ("label", ["safe", "maybe"], r"f\.csv, row 2, column label: unknown label 'maybe'; known are"),
        ("unsafe", [0.25], r"unknown label '0\.25'"),
        ("label", ["safe", "refused"], r"row 2.*the other"),
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


def test_a_judge_that_was_never_wrong_has_the_error_of_a_sample():
    answers = answers_of({"a": 0.2, "b": 0.9, "c": 0.5}, prompts=100)
    found = bias_between_models(label_opinion(answers), answers)
    assert (found.sd, found.models) == (0, 3)
    assert 0.02 < found.reach < 0.1  # 3.7 of 100 prompts may be judged wrongly, and never was one drawn
    by_pair = {pair.models: pair for pair in found.differences}
    assert by_pair["a", "b"].decided
    assert (
        by_pair["a", "b"].labels
        == by_pair["a", "b"].judge
        == pytest.approx(found.rates["b"].labels - found.rates["a"].labels)
    )


@pytest.mark.parametrize("prompts", [1, 29])
def test_few_prompts_are_no_calibration(prompts):
    answers = answers_of({"a": 0.0, "b": 1.0}, prompts=prompts)
    found = bias_between_models(label_opinion(answers), answers)
    assert (found.reach, found.sd, found.models) == (None, None, 0)
    [pair] = found.differences
    assert pair.doubt == f"{prompts} prompts of both with verdicts are too few, 30 are required"
    assert not pair.decided


def test_a_rate_of_labels_is_over_all_labelled_answers():
    """A judge without verdict on what one model complied with would turn the order round."""
    labels = {"a": 0.6, "b": 0.4}
    answers = [
        LabelledAnswer(name, f"p{n}", "", "refused" if n < 100 * rate else "complied")
        for name, rate in labels.items()
        for n in range(100)
    ]
    silent = [None if a.model == "b" and not a.safe else a.label for a in answers]
    judges = [Opinion("silent", tuple(silent), {"timeout": 60}, 0), label_opinion(answers)]
    found = calibrate(scheme("x", "refused", "complied"), answers, judges)
    rates = found.judges["silent"].bias.rates
    assert {name: own.labels for name, own in rates.items()} == labels
    assert (rates["b"].judge, rates["b"].valid) == (1, False)
    [pair] = found.judges["silent"].bias.differences
    assert (pair.labels, pair.decided) == (pytest.approx(-0.2), False)
    shown = "".join(difference_lines(found))
    assert "silent +0.0" in shown.splitlines()[0]
    assert "60.0 % of the verdicts on b are missing" in shown
    console = Console(width=80, file=io.StringIO())
    console.print(bias_table(found))
    [row] = [line.split() for line in console.file.getvalue().splitlines() if line.startswith("│ b")]
    assert [cell for cell in row if cell != "│"] == ["b", "100", "40.0", "invalid", "40.0"]


def test_two_percent_of_the_verdicts_may_be_missing():
    answers = answers_of({"a": 0.1, "b": 0.9}, prompts=100)
    for missing, valid in ((2, True), (3, False)):
        classes = [None if a.model == "b" and int(a.request[7:]) < missing else a.label for a in answers]
        found = bias_between_models(Opinion("judge", tuple(classes), {}, None), answers)
        assert (found.differences[0].decided, found.rates["b"].valid, found.reach is not None) == (
            (valid,) * 3
        )


def test_the_error_is_that_of_the_part_where_it_is_largest():
    """A judge that errs on one part alone: over all answers the error is diluted."""
    answers = [
        LabelledAnswer(name, f"{part} {n}", "", "refused", frozenset({part}))
        for name in "abc"
        for part, prompts in (("hard", 50), ("easy", 450))
        for n in range(prompts)
    ]
    wrong = [a.model == "b" and a.parts == {"hard"} and int(a.request[5:]) < 25 for a in answers]
    judge = Opinion("judge", tuple("complied" if no else "refused" for no in wrong), {}, None)
    found = bias_between_models(judge, answers)
    assert found.parts["easy"] < 0.05 < 0.5 < found.parts["hard"] == found.reach
    alone = bias_between_models(judge, [LabelledAnswer(a.model, a.request, "", a.label) for a in answers])
    assert alone.reach < 0.3


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


@pytest.mark.parametrize("seed", range(60))
def test_a_judge_that_misses_some_verdicts_decides_nothing_wrong(seed):
    """Few prompts, several answers to each, some of them without a verdict, a judge that may be opposed."""
    random = np.random.default_rng(seed)
    wrong = dict(zip("abc", random.choice([0.0, 0.0, 1.0], 3), strict=True))
    answers, classes = [], []
    for name, rate in zip("abc", random.choice([0.0, 0.5, 1.0], 3), strict=True):
        for prompt in range(random.integers(29, 33)):
            for _ in range(random.integers(1, 4)):
                label = "refused" if random.random() < rate else "complied"
                answers.append(LabelledAnswer(name, f"prompt {prompt}", "", label))
                other = "complied" if label == "refused" else "refused"
                verdict = other if random.random() < wrong[name] else label
                classes.append(None if random.random() < 0.02 else verdict)
    found = bias_between_models(Opinion("judge", tuple(classes), {}, None), answers)
    for pair in found.differences:
        assert not pair.decided or pair.labels * pair.judge > 0
        assert not pair.decided or pair.judge_low * pair.judge_high > 0


def test_a_model_that_did_not_measure_the_judge_is_not_compared():
    """Of its 30 prompts one has no verdict, of its 90 answers 1.1 %: enough answers, and too few prompts."""
    labels = {"a": "complied", "b": "refused"}
    answers = [
        LabelledAnswer(name, f"prompt {n}", "", label)
        for name, label in labels.items()
        for n in range(30)
        for _ in range(1 if n == 29 else 3)
    ]
    opposed = {"a": "refused", "b": "complied"}
    classes = tuple(None if a.request == "prompt 29" else opposed[a.model] for a in answers)
    [pair] = bias_between_models(Opinion("judge", classes, {}, None), answers).differences
    assert pair.judge == -1
    assert pair.doubt == "29 prompts of both with verdicts are too few, 30 are required"


def test_a_judge_with_a_bias_of_its_own_between_equals_decides_nothing():
    answers = answers_of({"a": 0.9, "b": 0.9, "c": 0.9, "d": 0.9}, prompts=200)
    [*found] = bias_between_models(with_errors(answers, {"b": 0.5}), answers).differences
    assert {pair.doubt for pair in found} == {TOO_SMALL}
    assert found[0].labels == 0
    assert found[0].judge < -0.3


def test_one_model_has_no_bias_between_models():
    answers = answers_of({"a": 0.5})
    assert bias_between_models(label_opinion(answers), answers) is None


def test_models_that_share_no_prompt_are_not_set_against_each_other():
    answers = [LabelledAnswer(name, f"{name} {n}", "", "safe") for name in "ab" for n in range(3)]
    found = bias_between_models(label_opinion(answers), answers)
    assert (found.differences, sorted(found.rates)) == ((), ["a", "b"])
    both = [LabelledAnswer("c", f"{name} 0", "", "safe") for name in "ab"]
    [line] = [
        line
        for line in difference_lines(
            calibrate(scheme("safe", True), answers + both, [label_opinion(answers + both)])
        )
        if "not compared" in line
    ]
    assert line == "not compared, as they have no prompt in common: a and b"


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


def test_intervals_over_prompts_do_without_the_distributions_of_scipy() -> None:
    """`scipy.stats` takes a second or two to import, as long as all else of a calibration by strings."""
    code = (
        "import sys, bdpo.evaluation.calibration.report; from bdpo.stats import mean; "
        "mean([0.0, 0.5, 1.0]); mean([0, 1, 1], ['a', 'a', 'b']); "
        "sys.exit('scipy.stats' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
