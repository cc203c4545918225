"""What a model answers to items, and the verdicts on it: lists in memory, without stores and shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bdpo.config import EvaluateConfig
from bdpo.evaluation.benchmarks.base import Row
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.benchmarks.registry import BENCHMARKS
from bdpo.evaluation.engines.base import Answer, Generate, Sampling
from bdpo.evaluation.judges.base import Judge, NoAnswer, Question, Verdict, addresses_judge, verdict_on
from bdpo.evaluation.texts import defect_of
from bdpo.evaluation.thoughts import opened_by, without_thoughts
from bdpo.models.loading import has_positions
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Response:
    """What a model answered to an item. The text is left out of the repr."""

    item_id: str
    response: str | None = field(default=None, repr=False)
    """None where nothing was asked; its thoughts stand between `<think>` and `</think>`, see `thoughts`."""
    new_tokens: int = 0
    cut: bool = False
    """Whether the answer reached its limit of tokens; without a text, whether the prompt left no room."""
    finite: bool = True


def prefill_ids(chat: ChatTokenizer, item: Item) -> list[int]:
    """The ids that the assistant's turn begins with: no end of turn, however short the prefill is."""
    return chat.prefill_ids(item.prefill)[: item.prefill_tokens] if item.prefill else []


@dataclass(frozen=True)
class Questionnaire:
    """How a model is asked: what of it an engine does not know."""

    evaluate: EvaluateConfig
    seed: int
    """Of the answers where `evaluate.temperature` is above 0."""
    chat: ChatTokenizer
    shape: PreTrainedConfig

    def responses(self, generate: Generate, items: Sequence[Item]) -> list[Response]:
        """The model's response to each item; those that are asked are generated for together."""
        evaluate = self.evaluate
        asked, prompts, prefills = self.conversations(items)
        draws = [item.sample for item in asked]
        sampling = Sampling(evaluate.temperature, self.seed, draws) if evaluate.temperature else None
        answers = generate(prompts, evaluate.max_new_tokens, prefills=prefills, sampling=sampling)
        answered = {item.item_id: answer for item, answer in zip(asked, answers, strict=True)}
        return [self._response(item, answered.get(item.item_id)) for item in items]

    def conversations(self, items: Sequence[Item]) -> tuple[list[Item], list[list[Message]], list[list[int]]]:
        """The items that are asked, what each asks, and the ids that its answer begins with.

        An item is asked if it has a prompt that leaves room for an answer: one that is too long fails alone.
        """
        asked, prompts, prefills = [], [], []
        for item in items:
            if item.prompt is None:
                continue
            prompt, prefill = [Message(role="user", content=item.prompt)], prefill_ids(self.chat, item)
            tokens = len(self.chat.prompt_ids(prompt)) + len(prefill) + self.evaluate.max_new_tokens
            if has_positions(self.shape, tokens):
                asked.append(item)
                prompts.append(prompt)
                prefills.append(prefill)
        return asked, prompts, prefills

    def _response(self, item: Item, answer: Answer | None) -> Response:
        """No text and no tokens where there was nothing to ask, and where the prompt was too long (`cut`)."""
        if answer is None:
            return Response(item.item_id, cut=item.prompt is not None)
        ids = self.chat.prompt_ids([Message(role="user", content=item.prompt or "")])
        text = opened_by(self.chat, ids) + answer.text
        return Response(item.item_id, text, answer.new_tokens, cut=answer.cut, finite=answer.finite)


def verdicts_on(
    judge: Judge,
    items: Sequence[Item],
    responses: Sequence[Response],
    progress: Callable[[int], None] = lambda verdicts: None,
) -> list[Verdict]:
    """The judge's verdict on each response, where there is an answer to be judged; several at a time.

    `progress` is called with the number of verdicts so far.

    Raises:
        UserError: the judge cannot judge anything, because the environment is wrong.
    """

    def verdict(item: Item, response: Response) -> Verdict:
        if response.response is None:
            return NoAnswer("prompt_too_long" if response.cut else "not_asked")
        if not response.finite:
            return NoAnswer("not_finite")
        question = Question(BENCHMARKS[item.benchmark].rubric, item.request, item.reference)
        return verdict_on(judge, question, response.response)

    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(judge.concurrency) as pool:
        for given in pool.map(verdict, items, responses):
            verdicts.append(given)
            progress(len(verdicts))
    return verdicts


def verdict_row(item: Item, answer: Response, verdict: Verdict) -> Row:
    """The row of VERDICT_SCHEMA of an item."""
    response = answer.response and without_thoughts(answer.response)
    return {
        "item_id": item.item_id,
        "benchmark": item.benchmark,
        "category": item.category,
        "should_comply": item.should_comply,
        "cluster": item.cluster or None,
        **verdict.columns(),
        "flagged": addresses_judge(response or ""),
        "new_tokens": answer.new_tokens,
        "cut": answer.cut and answer.response is not None,
        "broken": None if response is None else defect_of(response, item.request),
    }
