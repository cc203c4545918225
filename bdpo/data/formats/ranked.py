"""Several answers with a rank or a rating each: the best is chosen, the worst rejected.

Nectar (`answers` with `rank`), UltraFeedback (`completions` with `overall_score`) and distilabel
(`generations` beside `ratings`).
"""

from __future__ import annotations

from typing import Any

from bdpo.data.formats.base import (
    BadRow,
    Excluded,
    Format,
    Pair,
    Row,
    answer,
    checked_number,
    checked_text,
    list_cell,
    unread_keys,
)
from bdpo.data.formats.columns import refuse_media
from bdpo.data.formats.hh_rlhf import prompt_of_transcript
from bdpo.data.formats.instruction import INSTRUCTION_COLUMNS, instruction_prompt
from bdpo.data.formats.messages import prompt_cell
from bdpo.data.formats.transcript import is_transcript
from bdpo.models.template import Message

Rated = list[tuple[float, str]]

_OBJECTS = {"answers": ("rank", "answer"), "completions": ("overall_score", "response")}  # rating and text


def read(row: Row) -> Pair:
    """The answer that is rated best against the one that is rated worst; of equals the first.

    An answer whose rating or text is null or NaN is not one of them.

    Raises:
        Excluded: fewer than two answers are rated, or all alike, so there is nothing to prefer.
    """
    rated = _rated(row)
    if len({rating for rating, _ in rated}) < 2:
        raise Excluded("no answer is rated better than another")
    best = max(rated, key=lambda pair: pair[0])
    worst = min(rated, key=lambda pair: pair[0])
    return Pair(_prompt(row), answer(best[1]), answer(worst[1]), unread=_unread(row))


def _prompt(row: Row) -> list[Message]:
    """The prompt; without one the instruction and its input, as the format `instruction` reads them."""
    column = "prompt" if row.get("prompt") is not None else "instruction"
    if is_transcript(row.get(column)):
        return prompt_of_transcript(row, column)
    if column == "prompt" or isinstance(row.get(column), list):
        return prompt_cell(row, column)
    return instruction_prompt(row)


def _unread(row: Row) -> frozenset[str]:
    """The keys of rated answers that are not looked at, such as the model that gave them."""
    for column, keys in _OBJECTS.items():
        if column in row:
            return frozenset().union(*(unread_keys(f"{column}[]", given, keys) for given in row[column]))
    return frozenset()


def _rated(row: Row) -> Rated:
    if "answers" in row:
        return [(-rank, text) for rank, text in _objects(row, "answers")]
    if "completions" in row:
        return _objects(row, "completions")
    column = "ratings" if "ratings" in row else "rating"
    texts, ratings = list_cell(row, "generations"), list_cell(row, column)
    if len(texts) != len(ratings):
        raise BadRow(f"{column}: not as many as generations")
    pairs = zip(ratings, texts, strict=True)
    return [
        (checked_number(rating, column), checked_text(text, "generations"))
        for rating, text in pairs
        if _is_held(rating) and _is_held(text)
    ]


def _is_held(value: object) -> bool:
    """Whether it is neither null nor NaN, which is the null of pandas."""
    return value is not None and value == value


def _objects(row: Row, column: str) -> Rated:
    rating, text = _OBJECTS[column]
    answers: list[Any] = list_cell(row, column)
    if not all(isinstance(given, dict) for given in answers):
        raise BadRow(f"{column}: wrong type")
    for given in answers:
        refuse_media(given, f"{column}.")
    return [
        (checked_number(given[rating], f"{column}.{rating}"), checked_text(given[text], column))
        for given in answers
        if _is_held(given.get(rating)) and _is_held(given.get(text))
    ]


def _fits(row: Row) -> bool:
    if "chosen" in row or row.keys().isdisjoint(("prompt", "instruction")):
        return False
    for column, (rating, _) in _OBJECTS.items():
        answers = row.get(column)
        if isinstance(answers, list) and answers and isinstance(answers[0], dict) and rating in answers[0]:
            return True
    return "generations" in row and not row.keys().isdisjoint(("ratings", "rating"))


FORMAT = Format(
    name="ranked",
    read=read,
    fits=_fits,
    columns=("prompt", *INSTRUCTION_COLUMNS, "history", *_OBJECTS, "generations", "ratings", "rating"),
    expects="prompt,answers with rank, or instruction,generations,ratings",
)
