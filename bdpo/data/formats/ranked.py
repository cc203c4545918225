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
)
from bdpo.data.formats.hh_rlhf import prompt_of_transcript
from bdpo.data.formats.messages import prompt_cell
from bdpo.data.formats.transcript import is_transcript
from bdpo.models.template import Message

Rated = list[tuple[float, str]]


def read(row: Row) -> Pair:
    """The answer that is rated best against the one that is rated worst; of equals the first.

    An answer without rating is not one of them.

    Raises:
        Excluded: fewer than two answers are rated, or all alike, so there is nothing to prefer.
    """
    rated = _rated(row)
    if len({rating for rating, _ in rated}) < 2:
        raise Excluded("no answer is rated better than another")
    best = max(rated, key=lambda pair: pair[0])
    worst = min(rated, key=lambda pair: pair[0])
    return Pair(_prompt(row), answer(best[1]), answer(worst[1]))


def _prompt(row: Row) -> list[Message]:
    column = "prompt" if row.get("prompt") is not None else "instruction"
    if is_transcript(row.get(column)):
        return prompt_of_transcript(row, column)
    return prompt_cell(row, column)


def _rated(row: Row) -> Rated:
    if "answers" in row:
        return [(-rank, text) for rank, text in _objects(row, "answers", "rank", "answer")]
    if "completions" in row:
        return _objects(row, "completions", "overall_score", "response")
    column = "ratings" if "ratings" in row else "rating"
    texts, ratings = list_cell(row, "generations"), list_cell(row, column)
    if len(texts) != len(ratings):
        raise BadRow(f"{column}: not as many as generations")
    pairs = zip(ratings, texts, strict=True)
    return [
        (checked_number(rating, column), checked_text(text, "generations"))
        for rating, text in pairs
        if rating is not None and text is not None
    ]


def _objects(row: Row, column: str, rating: str, text: str) -> Rated:
    answers: list[Any] = list_cell(row, column)
    if not all(isinstance(given, dict) for given in answers):
        raise BadRow(f"{column}: wrong type")
    return [
        (checked_number(given[rating], f"{column}.{rating}"), checked_text(given.get(text), column))
        for given in answers
        if given.get(rating) is not None
    ]


def _fits(row: Row) -> bool:
    if "chosen" in row or row.keys().isdisjoint(("prompt", "instruction")):
        return False
    for column, key in (("answers", "rank"), ("completions", "overall_score")):
        answers = row.get(column)
        if isinstance(answers, list) and answers and isinstance(answers[0], dict) and key in answers[0]:
            return True
    return "generations" in row and not row.keys().isdisjoint(("ratings", "rating"))


FORMAT = Format(
    name="ranked",
    read=read,
    fits=_fits,
    columns=("prompt", "instruction", "answers", "completions", "generations", "ratings", "rating"),
    expects="prompt,answers with rank, or instruction,generations,ratings",
)
