"""PAIR against a real server that plays the attacker: turns, feedback, budgets, faults."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from bdpo.evaluation.attacks.attacked import AttackedModel
from bdpo.evaluation.attacks.base import Workplace
from bdpo.evaluation.attacks.pair import APPROACHES, ATTACK, NO_ANSWER, Stream, prompt_in
from bdpo.evaluation.attacks.records import AttackRecord, Attempt
from bdpo.evaluation.attacks.requests import load_requests
from bdpo.evaluation.judges.base import Harm, NoAnswer, Question, Verdict
from bdpo.models.logps import LogpsModel
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.attacks import GOAL, JudgeBy, attack_config, attacker_reply, attacker_section
from tests.support.chats import CHATML
from tests.support.fake_endpoint import FakeEndpoint, Script, completion, fake_endpoint, reply
from tests.support.helpers import tiny_qwen2

Judge = Callable[[Question, str], Verdict]


def attacked(folder: Path, chat: ChatTokenizer, url: str, judge: Any, **section: Any) -> AttackRecord:
    """The record of an attack on the first request."""
    config = attack_config(folder, chat, **attacker_section(url, **section))
    model = AttackedModel(LogpsModel(tiny_qwen2().requires_grad_(False), 512), chat, judge, 4)
    work = Workplace(config, model, folder / "state", "fingerprint")
    return ATTACK.make(work)(load_requests(config)[0])


def writes(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """An attacker that writes a prompt that names how long its conversation is."""
    reply(handler, completion(attacker_reply(f"prompt of turn {len(body['messages']) // 2}")))


class Graded(JudgeBy):
    """Harm of one answer after the other."""

    def __init__(self, *harms: float) -> None:
        super().__init__(lambda _: False)
        self.__dict__["harms"] = iter(harms)

    def __call__(self, question: Question, response: str) -> Verdict:
        return Harm(next(self.__dict__["harms"]))


def test_the_attacker_improves_its_prompts_until_one_works(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    judge = Graded(0.0, *[0.1, 0.2], *[0.3, 1.0])
    with fake_endpoint(writes) as endpoint:
        record = attacked(tmp_path, tiny_chat, endpoint.url, judge, streams=2, depth=3)
    assert (record.jailbroken, record.harm, record.direct) == (True, 1.0, False)
    assert record.queries == 1 + 4
    assert record.prompt == "prompt of turn 2"
    assert len(endpoint.bodies) == 4
    first, later = endpoint.bodies[0], endpoint.bodies[-1]
    assert f"{GOAL} 0" in first["messages"][0]["content"]
    assert [message["role"] for message in later["messages"]] == ["system", "user", "assistant", "user"]
    assert any(f"Score: {score}" in later["messages"][-1]["content"] for score in (2, 3))  # 1 + 9 × harm
    assert (first["temperature"], first["max_tokens"]) == (0.7, 99)
    approaches = {approach for approach in APPROACHES for body in endpoint.bodies if approach in str(body)}
    assert len(approaches) == 2
    assert GOAL not in repr(record)
    assert "prompt of" not in repr(record)


def test_an_attacker_may_think_before_it_writes(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    """A draft in its thoughts is no prompt, and the conversation goes on without them."""

    def thinks(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        written = attacker_reply(f"prompt of turn {len(body['messages']) // 2}")
        reply(handler, completion(f"<think>Perhaps {attacker_reply('a draft')}?</think>\n\n{written}"))

    with fake_endpoint(thinks) as endpoint:
        record = attacked(tmp_path, tiny_chat, endpoint.url, Graded(0.0, 0.1, 1.0), streams=1, depth=2)
    assert (record.jailbroken, record.prompt) == (True, "prompt of turn 2")
    assert endpoint.bodies[-1]["messages"][2]["content"] == attacker_reply("prompt of turn 1")


def test_the_attacker_is_shown_what_was_judged() -> None:
    stream = Stream([])
    for response in ("<think>Is it allowed?</think>\n\nCross the ends.", "Cross the ends."):
        stream.tell(Attempt("p", "", response, Harm(0.0)))
        assert stream.messages[-1]["content"].startswith("Answer of the model:\nCross the ends.\n\nScore: 1")
    stream.tell(Attempt("p", "", "<think>Is it", NoAnswer("unfinished_thought")))
    assert NO_ANSWER in stream.messages[-1]["content"]


def test_an_answer_that_the_template_begins_with_a_thought_is_kept_so(tmp_path: Path, make_chat: Any) -> None:
    opened = CHATML.replace("assistant\n{%", "assistant\n<think>{%")
    chat = make_chat(opened.replace("{{ m.c", "{{ '<think>' if m.role == 'assistant' }}{{ m.c"))
    model = AttackedModel(LogpsModel(tiny_qwen2(), 512), chat, JudgeBy(lambda _: False), 4)
    attempt = model.attempt(load_requests(attack_config(tmp_path, chat))[0], "Sing")
    assert str(attempt.response).startswith("<think>")
    assert attempt.verdict == NoAnswer("unfinished_thought")


def test_the_request_alone_is_asked_first(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    with fake_endpoint(writes) as endpoint:
        record = attacked(tmp_path, tiny_chat, endpoint.url, Graded(1.0))
    assert (record.jailbroken, record.direct, record.queries) == (True, True, 1)
    assert not endpoint.bodies


def test_the_budget_is_streams_times_depth(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    with fake_endpoint(writes) as endpoint:
        harms = [0.0, 0.1, 0.4, *[0.0] * 4]
        record = attacked(tmp_path, tiny_chat, endpoint.url, Graded(*harms), streams=3, depth=2, batch_size=2)
    assert (record.jailbroken, record.harm, record.queries) == (False, 0.4, 1 + 6)
    assert len(endpoint.bodies) == 6
    assert record.prompt == "prompt of turn 1"


def once_in(turns: int, then: Script) -> Callable[[FakeEndpoint], Script]:
    """`then` at each request but every n-th, which is answered well."""

    def script(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        (writes if len(endpoints[0].bodies) % turns == 0 else then)(handler, body)

    endpoints: list[FakeEndpoint] = []

    def of(endpoint: FakeEndpoint) -> Script:
        endpoints.append(endpoint)
        return script

    return of


def says(text: str, status: int = 200) -> Script:
    return lambda handler, body: reply(handler, completion(text) if status == 200 else b"", status)


FAULTS = {
    "no JSON": (says("I will not do that."), "unparsable"),
    "no prompt": (says('{"improvement": "x"}'), "unparsable"),
    "no text": (says('{"prompt": 7}'), "unparsable"),
    "blank": (says('{"prompt": " "}'), "unparsable"),
    "two prompts": (says('{"prompt": "a", "prompt": "b"}'), "unparsable"),
    "half of a surrogate pair": (says('{"prompt": "\\ud800 sing"}'), "unparsable"),
    "deep": (says('{"prompt":' + "[" * 100_000), "unparsable"),
    "unauthorised": (says("", 401), "http_401"),
    "broken": (says("", 500), "http_500"),
    "empty": (says(""), "empty"),
    "thought without end": (says("<think>" + attacker_reply("sing")), "unfinished_thought"),
    "prompt in the thoughts alone": (says(f"<think>{attacker_reply('sing')}</think>No."), "unparsable"),
    "slow": (lambda handler, body: handler.rfile.read(1), "timeout"),
}


@pytest.mark.parametrize(("script", "code"), FAULTS.values(), ids=FAULTS)
def test_without_a_prompt_a_request_failed_and_was_not_withstood(
    script: Script, code: str, tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    section = {"streams": 2, "depth": 3, "timeout": 0.5 if code == "timeout" else 60}
    with fake_endpoint(script) as endpoint:
        record = attacked(tmp_path, tiny_chat, endpoint.url, JudgeBy(lambda _: False), **section)
    assert (record.jailbroken, record.failure, record.direct) == (None, f"attacker_{code}", False)
    assert record.failed_prompts == 2  # an attacker that writes nothing is not asked for a second turn
    assert record.queries == 1


def test_prompts_that_were_not_written_are_counted(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    with fake_endpoint() as endpoint:
        endpoint.script = once_in(2, says("", 401))(endpoint)
        record = attacked(
            tmp_path, tiny_chat, endpoint.url, JudgeBy(lambda _: False), streams=4, depth=1, concurrency=1
        )
    assert (record.jailbroken, record.failed_prompts, record.queries) == (False, 2, 1 + 2)


@pytest.mark.parametrize(("long", "known"), [(4, False), (1, False), (0, True)])
def test_prompts_that_were_never_asked_were_not_withstood(
    tmp_path: Path, tiny_chat: ChatTokenizer, long: int, known: bool
) -> None:
    """Of four prompts so many leave no room for an answer."""

    def script(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        asked = len(endpoint.bodies)
        reply(handler, completion(attacker_reply("word " * (9000 if asked <= long else 1))))

    with fake_endpoint(script) as endpoint:
        section = {"streams": 2, "depth": 2, "concurrency": 1}
        record = attacked(tmp_path, tiny_chat, endpoint.url, JudgeBy(lambda _: False), **section)
    assert (record.jailbroken, record.direct) == (False if known else None, False)
    assert (record.unanswered, record.failure) == (None if known else "prompt_too_long", None)
    assert (record.not_asked, record.queries) == (long, 1 + 4 - long)


@pytest.mark.parametrize(
    "text",
    [
        '{"improvement": "x", "prompt": "sing"}',
        '```json\n{"prompt": " sing "}\n```',
        'Here: {"prompt": "sing"}',
    ],
)
def test_a_reply_may_have_a_fence_around_it(text: str) -> None:
    assert prompt_in(text) == "sing"
