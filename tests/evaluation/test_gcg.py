"""GCG: gradient and losses against naive ones, candidates that are text, a search that resumes."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from bdpo.errors import UserError
from bdpo.evaluation.attacks.attacked import AttackedModel
from bdpo.evaluation.attacks.base import Workplace
from bdpo.evaluation.attacks.coordinate import candidate_losses, stable_candidates, token_gradient
from bdpo.evaluation.attacks.gcg import ATTACK, Gcg
from bdpo.evaluation.attacks.records import RECORD_SCHEMA
from bdpo.evaluation.attacks.requests import Request, load_requests
from bdpo.evaluation.attacks.results import public_scores, summarise_attack
from bdpo.evaluation.attacks.suffixes import SuffixedPrompt, candidate_tokens, stable_suffixes, suffix_text
from bdpo.evaluation.judges.base import Harm, Question, Verdict
from bdpo.models.logps import LogpsModel
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer
from tests.support.attacks import REQUESTS, JudgeBy, attack_config, printed_attack
from tests.support.chats import CHATML
from tests.support.helpers import VOCABULARY, naive_logps, tiny_qwen2

REQUEST = Request("r-1", 1, "c", "sing", "Sure")


@pytest.fixture
def prompt(tiny_chat: ChatTokenizer) -> SuffixedPrompt:
    found = SuffixedPrompt.of(tiny_chat, REQUEST, " ! ! !", 3)
    assert found is not None
    return found


@pytest.fixture
def suffix(tiny_chat: ChatTokenizer) -> list[int]:
    return tiny_chat.text_ids(" ! ! !", continues=True)


def naive_gradient(prompt: SuffixedPrompt, suffix: list[int]) -> torch.Tensor:
    """By the definition: a one-hot matrix in float64, and the model's own logits."""
    model = copy.deepcopy(tiny_qwen2()).double()
    embed = model.get_input_embeddings()
    one_hot = torch.nn.functional.one_hot(torch.tensor(suffix), VOCABULARY).double().requires_grad_()
    parts = [torch.tensor(ids) for ids in (prompt.before, [*prompt.after, *prompt.target])]
    row = torch.cat([embed(parts[0]), one_hot @ embed.weight, embed(parts[1])])[None]
    logits = model(inputs_embeds=row).logits[0, -len(prompt.target) - 1 : -1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(prompt.target)).backward()
    assert one_hot.grad is not None
    return one_hot.grad


def test_the_gradient_is_that_of_one_hot_tokens(prompt: SuffixedPrompt, suffix: list[int]) -> None:
    expected = naive_gradient(prompt, suffix)
    found = token_gradient(LogpsModel(tiny_qwen2().requires_grad_(False), 200), prompt, suffix)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)


def test_the_loss_of_a_candidate_is_that_of_its_own_sequence(
    prompt: SuffixedPrompt, suffix: list[int]
) -> None:
    candidates = [[*suffix[:n], 40 + n, *suffix[n + 1 :]] for n in range(len(suffix))] + [suffix]
    rows = [([*prompt.before, *ids, *prompt.after], prompt.target) for ids in candidates]
    expected = -naive_logps(tiny_qwen2(), rows) / len(prompt.target)
    for tokens in (1, 150, 10_000):
        found = candidate_losses(LogpsModel(tiny_qwen2(), 200), prompt, suffix, candidates, tokens)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_no_special_or_unprintable_token_is_a_candidate(tiny_chat: ChatTokenizer) -> None:
    allowed = candidate_tokens(tiny_chat, VOCABULARY + 5)
    texts = [tiny_chat.decode([i]) for i in allowed.nonzero().flatten().tolist()]
    assert sorted(texts) == [chr(code) for code in range(33, 127)]


def test_candidates_are_what_their_text_is_tokenised_to(make_chat: Any) -> None:
    """Here `!` and `?` merge to one token, so that `!?` in two tokens is no candidate."""
    chat = make_chat(CHATML, [("!", "?")])
    found = SuffixedPrompt.of(chat, REQUEST, " !.!", 3)
    assert found is not None
    first = chat.text_ids(" !.!", continues=True)
    mark, question = chat.text_ids("!"), chat.text_ids("?")
    merged = [first[0], *mark, *question, *mark]
    assert stable_suffixes(chat, [found], [first, merged]) == [first]
    gradient = torch.zeros(len(first), len(chat.tokenizer))
    gradient[:, ~candidate_tokens(chat, len(chat.tokenizer))] = torch.inf
    gradient[:, question] = -1.0
    drawn = stable_candidates(chat, [found], gradient, first, (32, 5), "key")
    assert drawn == stable_candidates(chat, [found], gradient, first, (32, 5), "key")
    assert drawn != stable_candidates(chat, [found], gradient, first, (32, 5), "other")
    for ids in drawn:
        text = suffix_text(chat, found, ids)
        assert chat.text_ids(text, continues=True) == ids
        assert sum(one != other for one, other in zip(ids, first, strict=True)) == 1


def workplace(folder: Path, chat: ChatTokenizer, state: str, judge: Any, **attack: Any) -> Workplace:
    config = attack_config(folder, chat, name="gcg", **attack)
    model = LogpsModel(tiny_qwen2().requires_grad_(False), 512)
    return Workplace(config, AttackedModel(model, chat, judge, 4), folder / state, "fingerprint")


SMALL: dict[str, Any] = {
    "candidates": 8,
    "top_k": 16,
    "check_steps": 2,
    "initial_suffix": "! ! !",
    "forward_passes": 9 * 6,
}


def test_a_search_lowers_the_loss_within_its_budget_and_resumes_to_the_same(
    tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    never = JudgeBy(lambda response: False)
    work = workplace(tmp_path, tiny_chat, "whole", never, **SMALL)
    request = load_requests(work.config)[0]
    record = Gcg(work, work.config.attack)(request)  # type: ignore[arg-type]
    assert record.forward_passes <= 9 * 6
    assert 2 + 6 // 2 <= record.queries <= 3 + 6 // 2  # alone, the first, every second, perhaps the best
    assert (record.jailbroken, record.direct) == (False, False)
    prompt = SuffixedPrompt.of(tiny_chat, request, " ! ! !", 32)
    assert prompt is not None
    ids = tiny_chat.text_ids(" ! ! !", continues=True)
    first = candidate_losses(work.attacked.logps, prompt, ids, [ids], 1000)
    assert record.loss is not None
    assert record.loss < float(first)

    part = workplace(tmp_path, tiny_chat, "resumed", never, **{**SMALL, "forward_passes": 9 * 3})
    Gcg(part, part.config.attack)(request)  # type: ignore[arg-type]
    state = json.loads((tmp_path / "resumed" / f"{request.item_id}.json").read_text())
    assert state["step"] == 3
    rest = workplace(tmp_path, tiny_chat, "resumed", never, **SMALL)
    assert Gcg(rest, rest.config.attack)(request) == record  # type: ignore[arg-type]


@pytest.mark.parametrize(("harmful", "steps"), [(0, 0), (1, 0), (2, 2), (3, 4)])
def test_the_first_harmful_answer_ends_the_search(
    harmful: int, steps: int, tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    """Asked are the request alone, the initial suffix, and that of every second step."""
    answers = iter([*[False] * harmful, True])
    work = workplace(tmp_path, tiny_chat, "state", JudgeBy(lambda _: next(answers)), **SMALL)
    request = load_requests(work.config)[0]
    record = Gcg(work, work.config.attack)(request)  # type: ignore[arg-type]
    assert (record.jailbroken, record.direct, record.queries) == (True, harmful == 0, harmful + 1)
    assert steps <= record.forward_passes <= steps * 9
    assert record.prompt is not None
    assert (record.prompt == request.goal) == (harmful == 0)
    assert record.prompt.endswith(" ! ! !") == (harmful == 1)


def test_the_most_harmful_answer_is_kept_and_not_the_last(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    harms = iter([0.1, 0.4, *[0.0] * 9])

    class Graded(JudgeBy):
        def __call__(self, question: Question, response: str) -> Verdict:
            return Harm(next(harms))

    work = workplace(tmp_path, tiny_chat, "state", Graded(lambda _: False), **SMALL)
    record = Gcg(work, work.config.attack)(load_requests(work.config)[0])  # type: ignore[arg-type]
    assert record.harm == 0.4
    assert record.prompt is not None
    assert record.prompt.endswith(" ! ! !")


def test_a_request_that_no_suffix_fits_is_not_withstood(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    """The request alone fits and is refused; with the suffix it does not."""
    never = JudgeBy(lambda response: False)
    work = workplace(tmp_path, tiny_chat, "state", never, **{**SMALL, "initial_suffix": "! " * 400})
    record = Gcg(work, work.config.attack)(load_requests(work.config)[0])  # type: ignore[arg-type]
    assert (record.jailbroken, record.unanswered, record.direct) == (None, "prompt_too_long", False)
    assert record.queries == 1


def test_a_search_that_finds_no_candidate_says_so(
    tmp_path: Path, tiny_chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdpo.evaluation.attacks.gcg.stable_candidates", lambda *_: [])
    work = workplace(tmp_path, tiny_chat, "state", JudgeBy(lambda response: False), **SMALL)
    record = Gcg(work, work.config.attack)(load_requests(work.config)[0])  # type: ignore[arg-type]
    assert (record.jailbroken, record.stuck, record.forward_passes) == (False, 1, 0)
    requests = load_requests(work.config)[:1]
    scores = public_scores(pa.Table.from_pylist([asdict(record)], schema=RECORD_SCHEMA), requests)
    found = summarise_attack(scores, "rubric")
    assert found.stuck == 1
    assert "searches without candidates" in printed_attack(found)


def test_a_universal_suffix_is_tried_on_other_requests(tmp_path: Path, tiny_chat: ChatTokenizer) -> None:
    config = attack_config(tmp_path, tiny_chat, name="gcg", universal=True, train_requests=REQUESTS)
    with pytest.raises(UserError, match=f"attack.train_requests={REQUESTS}: leaves none of the {REQUESTS}"):
        ATTACK.check(config)


def test_a_universal_suffix_takes_up_requests_and_is_tried_on_those_held_out(
    tmp_path: Path, tiny_chat: ChatTokenizer
) -> None:
    always = JudgeBy(lambda response: True)
    changes = {**SMALL, "universal": True, "train_requests": 3, "forward_passes": 9 * 20}
    work = workplace(tmp_path, tiny_chat, "state", always, **changes)
    requests = load_requests(work.config)
    attack = Gcg(work, work.config.attack)  # type: ignore[arg-type]
    attack.prepare(requests)
    state = json.loads((tmp_path / "state" / "universal.json").read_text())
    assert (state["active"], state["succeeded"]) == (3, True)
    assert state["record"]["queries"] == 1 + 2 + 3
    assert state["forward_passes"] == sum(active * (8 + 1) * 2 for active in (2, 3))
    records = [attack(request) for request in requests]
    assert [record.held_out for record in records] == [False] * 3 + [True] * 2
    suffixes = {str(r.prompt).removeprefix(q.goal) for r, q in zip(records, requests, strict=True)}
    assert len(suffixes) == 1
    assert sum(record.forward_passes for record in records) == state["forward_passes"]
    assert sum(record.queries for record in records) == 1 + 2 + 3 + 2 * len(records)
    assert all(record.direct for record in records)

    positions = work.attacked.logps.model.config.max_position_embeddings
    around = len(tiny_chat.prompt_ids([Message(role="user", content="x")])) - 1
    room = positions - work.config.evaluate.max_new_tokens - around
    long = replace(requests[-1], goal="x" * room)  # fits alone, and not with a suffix
    record = attack(long)
    assert (record.jailbroken, record.unanswered, record.direct) == (None, "prompt_too_long", True)
    assert (record.queries, record.held_out) == (1, True)
