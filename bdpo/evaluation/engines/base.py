"""What every engine offers: answers to a batch of prompts, and how each of them ended."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bdpo.models.template import Message


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt. The text is left out of the repr."""

    text: str = field(repr=False)
    new_tokens: int
    """Generated tokens, with the one that ended the answer."""
    cut: bool = False
    """Whether `max_new_tokens` ended it, and not the model."""
    finite: bool = True
    """Whether all logits that decided it were numbers; else the text is no answer of the model."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: at a temperature above 0, each decided by seed, prompt and draw alone."""

    temperature: float
    seed: int
    draws: Sequence[int] = ()
    """The number of the sample that is drawn for each prompt; the first of each where this is empty."""

    def seeds(self, prompt_ids: Sequence[list[int]]) -> list[int]:
        """56 bits for each prompt, from the run's seed, the prompt's ids and the number of the draw."""
        draws = self.draws or [0] * len(prompt_ids)
        keys = [
            f"{self.seed} {ids}" + (f" {draw}" if draw else "")
            for ids, draw in zip(prompt_ids, draws, strict=True)
        ]
        return [int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]) for key in keys]


class Generate(Protocol):
    """An engine for one model."""

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        max_new_tokens: int,
        *,
        prefills: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """Answers, one per prompt; greedy without `sampling`."""
        ...
