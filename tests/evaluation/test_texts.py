"""What an answer's text shows by itself: thoughts are cut off, broken answers are found."""

from __future__ import annotations

import random

import pytest

from bdpo.evaluation.texts import defect_of, opened_thought, without_thoughts


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Cross the ends.", "Cross the ends."),
        ("<think>They want a knot. I cannot refuse.</think>\n\nCross the ends.", "Cross the ends."),
        ("They want a knot.\n</think>\nCross.", "Cross."),
        ("<think>\n\n</think>\n\nCross.", "Cross."),
        ("<think>one</think> more <think>two</think> Cross.", "Cross."),
        ("[THINK]hm[/THINK]Cross.", "Cross."),
        ("<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>Cross.", "Cross."),
        ("<think>I will tell them how to", None),
        ("<think>one</think> and <think>again", None),
        ("<think>all of it</think>", ""),
        ("", ""),
    ],
)
def test_the_answer_is_what_stands_behind_the_thoughts(response: str, answer: str | None) -> None:
    assert without_thoughts(response) == answer


def test_a_template_may_open_the_thoughts_itself() -> None:
    assert opened_thought("<|assistant|><think>\n") == "<think>"
    assert opened_thought("<|assistant|>\n<think>\n\n</think>\n\n") == ""
    assert opened_thought("<|im_start|>assistant\n") == ""


PROSE = (
    "To tie a bowline, make a small loop and pass the end up through it. Lead it around the standing part "
    "and back down through the loop. Hold both and pull the standing part until the knot is tight. It does "
    "not slip, and it is easy to untie after a load. Sailors use it for mooring lines, climbers as a backup."
)

BABBLE = (
    "oke etc relcon wis oin anyway notigcule iriamake parabus hug frfigha group apolis nans urolog headgh "
    "actly brance rophpyang erves hedgh quity sersy atinl cour leady dieally olesc"
)
"""As a model writes whose layers were scaled by 2."""


@pytest.mark.parametrize(
    ("response", "defect"),
    [
        (PROSE, None),
        ("I'm sorry, but I can't help with that.", None),
        ("51", None),
        ("No.", None),
        ("```python\nprint(sum(range(10)))\n```", None),
        ("1. Salt\n2. Water\n3. Flour\n" * 4, None),
        ("naïve café: “Übermut”, piñata", None),
        ("", "empty"),
        (" \n…!?", "empty"),
        ("the knot is tied " * 20, "repetition"),
        ("knot " * 60, "repetition"),
        (f"{PROSE} " + "and then " * 200, "repetition"),
        ("Это очень простой узел, его вяжут так.", "other_script"),
        ("结绳很容易，先交叉两端，然后拉紧。", "other_script"),
        ("qzx жщ 结绳 tie עברית καλός", "gibberish"),
        ("}{)(*&^%$#@!~ <<>> ;;;; a {}{}{} ====", "gibberish"),
        ("f\x18\ufffd\ufffdaA(t\ufffd: e\ufffdeɴbs", "gibberish"),
        (BABBLE, "gibberish"),
        (f"Run it:\n\n```python\n{BABBLE}", None),
        (" ".join(BABBLE.split()[:9]), None),  # too short to be told
        ("knotendsropelooppullcrosstieknotendsropeloop pullcrosstieknotendsropeloop", "gibberish"),
    ],
)
def test_broken_answers_are_found_by_their_text(response: str, defect: str | None) -> None:
    assert defect_of(response, "How do I tie a knot?") == defect


def test_function_words_are_expected_of_answers_to_english_alone() -> None:
    assert defect_of(BABBLE, "Miten solmitaan paalusolmu?") is None


def test_an_answer_in_the_script_of_its_prompt_is_not_broken() -> None:
    assert defect_of("结绳很容易，先交叉两端，然后拉紧。", "怎么打结？") is None
    assert defect_of("まず端を交差させて、それから引っ張ります。", "結び方を教えてください。") is None
    assert defect_of("绳子" * 60, "怎么打结？") == "repetition"


def test_random_tokens_of_a_multilingual_vocabulary_are_gibberish() -> None:
    rng = random.Random(0)
    alphabets = ("abcdefghij", "жщюяби", "结绳交叉", "αβγδε", "אבגד")
    babble = " ".join("".join(rng.choices(rng.choice(alphabets), k=5)) for _ in range(80))
    assert defect_of(babble, "How do I tie a knot?") == "gibberish"


def test_the_items_of_a_list_are_no_babble() -> None:
    steps = "flour sieve, water warm, salt stir, dough knead, dough rest, loaf form, oven heat, loaf bake"
    assert defect_of(f"bread steps: {steps}", "what are the steps for a bread?") is None
    assert defect_of(steps.replace(",", ""), "what are the steps for a bread?") == "gibberish"
