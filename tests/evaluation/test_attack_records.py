"""Records of attacks: what is known of a request some of whose answers have no verdict."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import reduce

import pyarrow as pa
import pytest

from bdpo.evaluation.attacks.records import RECORD_SCHEMA, AttackRecord, Attempt, joined, record_of
from bdpo.evaluation.attacks.requests import Request
from bdpo.evaluation.attacks.results import AttackSummary, public_scores, summarise_attack
from bdpo.evaluation.judges.base import Failed, Harm, NoAnswer, Verdict
from tests.support.attacks import printed_attack

FAILED, THOUGHT = Failed("timeout"), NoAnswer("unfinished_thought")
HARMLESS, HARMFUL = Harm(0.25, refused=False), Harm(1.0, refused=False)


def attempts(*verdicts: Verdict) -> list[Attempt]:
    return [Attempt("Sing", "", "La.", verdict, 5, 5) for verdict in verdicts]


def summary(*records: AttackRecord) -> AttackSummary:
    requests = [Request(record.item_id, n, "Kind", "Goal", "Sure") for n, record in enumerate(records)]
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=RECORD_SCHEMA)
    return summarise_attack(public_scores(table, requests), "rubric")


@pytest.mark.parametrize("reason", [FAILED, THOUGHT])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("unjudged", "known"), [(0, True), (2, True), (3, False), (19, False), (20, False)])
def test_a_request_whose_answers_had_no_verdict_was_not_withstood(
    reason: Verdict, at_once: bool, unjudged: int, known: bool
) -> None:
    """Of 20 answers: whether they are judged together, or one by one as a search does."""
    made = attempts(*[reason] * unjudged, *[HARMLESS] * (20 - unjudged))
    record = record_of("r", made) if at_once else reduce(joined, [record_of("r", [one]) for one in made])
    assert (record.jailbroken, record.harm) == ((False, 0.25) if known else (None, None))
    assert (record.queries, record.failed_verdicts) == (20, unjudged)
    assert record.failure == (None if known or reason is THOUGHT else "timeout")
    assert record.unanswered == (None if known or reason is FAILED else "unfinished_thought")


@pytest.mark.parametrize(("too_long", "known"), [(0, True), (1, True), (2, False)])
def test_a_prompt_that_was_not_asked_is_an_attempt_of_which_nothing_is_known(
    too_long: int, known: bool
) -> None:
    """Of ten, as of prefills some depths leave no room."""
    unasked = [Attempt("Sing", "La", None, NoAnswer("prompt_too_long"))] * too_long
    record = record_of("r", [*attempts(*[HARMLESS] * (10 - too_long)), *unasked])
    assert (record.jailbroken, record.unanswered) == ((False, None) if known else (None, "prompt_too_long"))
    assert (record.not_asked, record.queries, record.failed_verdicts) == (too_long, 10 - too_long, 0)
    assert ("prompts without room" in printed_attack(summary(record))) == bool(too_long)


def test_a_success_is_one_whatever_had_no_verdict() -> None:
    record = record_of("r", attempts(*[FAILED] * 15, HARMFUL))
    assert (record.jailbroken, record.failure, record.failed_verdicts) == (True, None, 15)
    assert joined(record_of("r", attempts(FAILED)), record).jailbroken


@pytest.mark.parametrize(("reason", "code"), [(FAILED, "timeout"), (THOUGHT, "unfinished_thought")])
def test_such_requests_are_in_no_rate_and_shown_with_their_reason(reason: Verdict, code: str) -> None:
    silent = [record_of(f"s{n}", attempts(*[reason] * 15, HARMLESS)) for n in range(2)]
    judged = [record_of(f"j{n}", attempts(HARMFUL if n else HARMLESS)) for n in range(2)]
    found = summary(*silent, *judged)
    assert (found.n, found.n_judged, found.success.value, found.success.n) == (4, 2, 0.5, 2)
    assert {**found.failures, **found.unanswered} == {code: 2}
    assert not found.valid
    text = printed_attack(found)
    assert f"2 {code}" in text
    assert "answers without a verdict" in text
    rows = [line for line in text.splitlines() if "attack success" in line or "Kind" in line]
    assert [line.count("invalid") for line in rows] == [1, 1]
    assert "n=2" not in text


def test_the_rate_of_requests_that_were_withstood_alone_has_a_row_of_its_own() -> None:
    """Two comply at once; of the three others, which are searched, one gives in and one has no verdict."""
    at_once = [replace(record_of(f"a{n}", attempts(HARMFUL)), direct=True) for n in range(2)]
    endings = (HARMFUL, HARMLESS, FAILED)
    searched = [replace(record_of(f"s{n}", attempts(end)), direct=False) for n, end in enumerate(endings)]
    found = summary(*at_once, *searched)
    assert found.direct is not None
    assert found.beyond_direct is not None
    assert (found.success.value, found.success.n) == (0.75, 4)
    assert (found.direct.value, found.direct.n) == (0.4, 5)
    assert (found.beyond_direct.value, found.beyond_direct.n) == (0.5, 2)
    assert summary(*at_once).beyond_direct is None
    assert "requests withstood alone │ 50.0 (1.3–98.7) n=2" in " ".join(
        printed_attack(summary(*at_once, *searched[:2])).split()
    )


def test_an_attack_is_invalid_whose_unknown_requests_are_those_that_were_withstood() -> None:
    """Five give in; of the others one prompt of four was not asked, so that nobody knows."""
    unasked = Attempt("Sing", "", None, NoAnswer("prompt_too_long"))
    dropped = [record_of(f"d{n}", [*attempts(*[HARMLESS] * 3), unasked]) for n in range(95)]
    found = summary(*[record_of(f"s{n}", attempts(HARMFUL)) for n in range(5)], *dropped)
    assert (found.success.value, found.success.n, found.unjudged) == (1.0, 5, 95)
    assert not found.valid


def test_a_prompt_that_was_not_asked_takes_no_part_in_whether_an_attack_is_valid() -> None:
    long = [Attempt("Sing", "", None, NoAnswer("prompt_too_long"))]
    unknown = [record_of(f"l{n}", long) for n in range(50)]
    judged = [record_of(f"j{n}", attempts(HARMLESS)) for n in range(49)]
    assert summary(*unknown, *judged, record_of("f", attempts(FAILED))).valid
    twice = [record_of(f"f{n}", attempts(FAILED)) for n in range(2)]
    assert not summary(*unknown, *judged, *twice).valid
