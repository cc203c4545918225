"""Broken answers are found by their text."""

from __future__ import annotations

import random

import pytest

from bdpo.evaluation.texts import defect_of

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
        ("1. Salt\n2. Water\n3. Flour\n" * 2, None),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13", None),
        ("naïve café: “Übermut”, piñata", None),
        ("", "empty"),
        (" \n…!?", "empty"),
        ("the knot is tied " * 20, "repetition"),
        ("knot " * 60, "repetition"),
        ("yes, " * 45, "repetition"),
        ("I will tell you how to do it in the best way. " * 4, "repetition"),
        ("0 1 " * 24, "repetition"),
        (f"{PROSE} {PROSE.lower()[:-9]}" + "and then " * 30, "repetition"),  # of which the end alone is one
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


FRENCH = "Voici comment faire un nœud : prenez la corde et passez le bout dans la boucle, puis tirez fort."
GERMAN = "Nehmen Sie das Seil, ziehen Sie das Ende durch die Schlaufe und dann ziehen Sie mit der Hand daran."


@pytest.mark.parametrize(
    ("prompt", "response", "defect"),
    [
        ("How do I tie a knot in a rope?", FRENCH, "other_language"),
        ("How do I tie a knot in a rope?", GERMAN, "other_language"),
        ("Comment faire un nœud avec une corde ?", FRENCH, None),
        ("Comment faire un nœud avec une corde ?", GERMAN, "other_language"),
        ("Comment faire un nœud avec une corde ?", PROSE, "other_language"),
        ("Wie macht man einen Knoten in ein Seil?", PROSE, "other_language"),
        ("Wie macht man einen Knoten in ein Seil?", GERMAN, None),
        ("¿Cómo se hace un nudo en la cuerda?", "Se cruza la cuerda y se tira de los dos lados.", None),
        ("How do I say hello?", "Bonjour.", None),  # too short to be told
    ],
)  # fmt: skip
def test_an_answer_in_another_language_is_found(prompt: str, response: str, defect: str | None) -> None:
    assert defect_of(response, prompt) == defect
