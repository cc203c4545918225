"""The classifier that is fitted on labelled answers: the same after its file, safe to read, and of use."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from bdpo.errors import UserError
from bdpo.evaluation.calibration.agreement import agreement, label_opinion
from bdpo.evaluation.calibration.fitting import cross_validate, fit
from bdpo.evaluation.calibration.labels import LabelledAnswer
from bdpo.evaluation.judges.base import Harm, Question, Refusal
from bdpo.evaluation.judges.fitted import FittedJudge, new_vectorizer, read_classifier
from bdpo.evaluation.judges.registry import judge_fingerprint, judge_kind, make_judge
from bdpo.storage.sealed import sealed
from tests.support.helpers import tiny_config

DECLINES = (
    "That is not a thing to talk about",
    "Let us leave this topic alone",
    "This topic is closed to me",
)
HELPS = (
    "First take the rope and cross it",
    "Here is the rope and the way to tie it",
    "Take the rope and pull",
)


def answers(models=3, each=30):
    """Answers whose words show what they are, though no phrase of `string_matching` is among them."""
    draw = random.Random(0)
    return [
        LabelledAnswer(
            f"model {model}",
            f"prompt {n}",
            f"{draw.choice(DECLINES if n % 2 else HELPS)}, {draw.choice(('friend', 'dear', 'so'))} {n}.",
            "refused" if n % 2 else "complied",
        )
        for model in range(models)
        for n in range(2 * each)
    ]


@pytest.fixture(scope="module")
def classifier():
    return fit(answers(), "refusal")


def test_the_file_holds_the_same_classifier(classifier, tmp_path):
    kept = classifier.with_reach(0.125)
    kept.write(tmp_path / "judge.json")
    read = read_classifier(str(tmp_path / "judge.json"))
    assert read == kept
    for text in ("This topic is closed.", "Take the rope.", "", "ünïcode"):
        assert read.decision(text) == kept.decision(text)


def test_the_decision_is_that_of_scikit_learn(classifier):
    """The terms, idf and weights that the file keeps are all that decides."""
    from sklearn.linear_model import LogisticRegression

    texts, labels = [a.response for a in answers()], [a.safe for a in answers()]
    vectorizer = new_vectorizer(min_df=3)
    model = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
    model.fit(vectorizer.fit_transform(texts), labels)
    asked = [*DECLINES, *HELPS, "I'm sorry, but no."]
    expected = model.decision_function(vectorizer.transform(asked))
    assert [classifier.decision(text) for text in asked] == pytest.approx(list(expected))


def test_a_model_that_it_was_not_fitted_on_is_judged():
    found = cross_validate(answers(), "refusal", lambda rows: None)
    assert agreement(label_opinion(answers()), found, [a.request for a in answers()]).accuracy.value == 1
    assert found.contradictions == 0
    alone = [a for a in answers() if a.model == "model 0"]
    assert None not in cross_validate(alone, "refusal", lambda rows: None).classes


def test_what_is_left_out_is_not_fitted_on():
    """One model's labels are swapped: its own classifier cannot know, and is wrong throughout."""
    swapped = [
        a
        if a.model != "model 0"
        else LabelledAnswer(a.model, a.request, a.response, "complied" if a.safe else "refused")
        for a in answers()
    ]
    safe = cross_validate(swapped, "refusal", lambda rows: None).safe()
    first = np.array([a.model == "model 0" for a in swapped])
    labels = np.array([a.safe for a in swapped])
    assert (safe != labels)[first].all()


def test_it_is_a_judge(classifier, tmp_path):
    file = tmp_path / "judge.json"
    classifier.with_reach(0.125).write(file)
    judge = {"name": "fitted", "path": str(file)}
    config = tiny_config(tmp_path, tmp_path / "model", tmp_path / "pairs", evaluate={"judge": judge})
    made = make_judge(config)
    assert made == FittedJudge(read_classifier(str(file)))
    assert made(Question("refusal", "Tie"), "This topic is closed to me.") == Refusal(True)
    assert made(Question("harm", "Tie"), "Here is the rope.") == Harm(1.0, refused=False)
    assert made(Question("harm", "Tie"), " ") == Harm(0.0, refused=True)
    assert "fitted on 180 answers with labels of refusal" in judge_kind(config).check(config)
    assert judge_kind(config).reach(config) == {"refusal": 0.125}
    assert config.evaluate.files()[0] == str(file)
    before = judge_fingerprint(config)
    classifier.with_reach(None).write(file)
    assert judge_fingerprint(config) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: {**content, "weights": content["weights"][:-1]},
        lambda content: {**content, "intercept": float("nan")},
        lambda content: {**content, "format": "another"},
        lambda content: {**content, "rubric": "grade"},
        lambda content: {**content, "extra": 1},
        lambda content: [content],
    ],
)
def test_a_file_that_is_no_classifier_is_refused(classifier, tmp_path, damage):
    file = tmp_path / "judge.json"
    classifier.write(file)
    content = json.loads(file.read_text())
    content.pop("digest")
    damaged = damage(content)
    file.write_text(sealed(damaged) if isinstance(damaged, dict) else json.dumps(damaged))
    with pytest.raises(UserError, match=r"evaluate\.judge\.path=.*not a classifier") as raised:
        read_classifier(str(file))
    assert "\n" not in str(raised.value)


def test_a_changed_weight_is_noticed(classifier, tmp_path):
    file = tmp_path / "judge.json"
    classifier.write(file)
    file.write_text(file.read_text().replace('"n": ', '"n": 1'))
    with pytest.raises(UserError, match="damaged"):
        read_classifier(str(file))
    with pytest.raises(UserError, match="no such file"):
        read_classifier(str(tmp_path / "none.json"))


def test_too_few_answers_are_refused():
    with pytest.raises(UserError, match="at least 20 of each class"):
        fit(answers(models=1, each=10), "refusal")
