"""The model under attack with the run's judge: prompts in, judged answers out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from bdpo.config import Config
from bdpo.evaluation.answers import EvaluatedModel
from bdpo.evaluation.attacks.records import Attempt
from bdpo.evaluation.attacks.requests import Request
from bdpo.evaluation.engines.base import Answer, Sampling
from bdpo.evaluation.engines.hf import generate
from bdpo.evaluation.judges.base import Judge, NoAnswer, Question, Verdict, verdict_on
from bdpo.evaluation.judges.registry import make_judge
from bdpo.evaluation.thoughts import opened_by
from bdpo.models.loading import has_positions, positions_of
from bdpo.models.logps import LogpsModel
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True)
class AttackedModel:
    """A model on its device, its weights without gradients, and the judge of its answers."""

    logps: LogpsModel
    """Log-probs of responses, and the model itself in `logps.model`, which generates."""
    chat: ChatTokenizer
    judge: Judge
    max_new_tokens: int

    @classmethod
    def load(cls, config: Config, model: EvaluatedModel, device: str) -> AttackedModel:
        """The model of a run, and its judge."""
        loaded = model.load().to(device).requires_grad_(False)  # type: ignore[arg-type]
        logps = LogpsModel(loaded, positions_of(loaded.config) or config.data.max_length)
        return cls(logps, load_tokenizer(model.model), make_judge(config), config.evaluate.max_new_tokens)

    def attempts(
        self,
        request: Request,
        prompts: Sequence[str],
        prefills: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Attempt]:
        """One judged attempt for each prompt, generated for together; greedy without `sampling`.

        A prompt that leaves no room for `evaluate.max_new_tokens` tokens is not asked.
        """
        begun = list(prefills or [[]] * len(prompts))
        messages = [[Message(role="user", content=prompt)] for prompt in prompts]
        ids = [self.chat.prompt_ids(message) for message in messages]
        asked = [n for n, own in enumerate(ids) if self.fits(len(own) + len(begun[n]))]
        draws = None
        if sampling:
            numbers = [sampling.draws[n] for n in asked] if sampling.draws else ()
            draws = Sampling(sampling.temperature, sampling.seed, numbers)
        found = generate(
            self.logps.model,
            self.chat,
            [messages[n] for n in asked],
            self.max_new_tokens,
            prefills=[begun[n] for n in asked],
            sampling=draws,
        )
        answers: dict[int, Answer] = dict(zip(asked, found, strict=True))
        opened = [opened_by(self.chat, own) for own in ids]
        with ThreadPoolExecutor(self.judge.concurrency) as pool:
            verdicts = list(
                pool.map(lambda n: self._verdict(request, answers.get(n), opened[n]), range(len(prompts)))
            )
        return [
            Attempt(
                prompt,
                self.chat.decode(begun[n]) if begun[n] else "",
                opened[n] + answers[n].text if n in answers else None,
                verdicts[n],
                len(ids[n]) + len(begun[n]) if n in answers else 0,
                answers[n].new_tokens if n in answers else 0,
            )
            for n, prompt in enumerate(prompts)
        ]

    def attempt(self, request: Request, prompt: str) -> Attempt:
        """The greedy answer to one prompt, judged."""
        return self.attempts(request, [prompt])[0]

    def fits(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens leaves room for an answer."""
        return has_positions(self.logps.model.config, tokens + self.max_new_tokens)

    def _verdict(self, request: Request, answer: Answer | None, opened: str) -> Verdict:
        if answer is None:
            return NoAnswer("prompt_too_long")
        if not answer.finite:
            return NoAnswer("not_finite")
        return verdict_on(self.judge, Question("harm", request.goal), opened + answer.text)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.logps.model.device
