"""Best-of-n sampling: many answers to one request, drawn at a temperature, until one of them is harmful.

Hughes et al., "Best-of-N Jailbreaking", arXiv 2412.03556, whose augmentations are those of
`bon/attacks/run_text_augmentation.py` in github.com/jplhughes/bon-jailbreaking: each draw may scramble words,
capitalise at random and shift characters. The paper takes n up to 10,000.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from bdpo.config.attack import BestOfNConfig
from bdpo.evaluation.attacks.base import Attack, AttackKind, Workplace
from bdpo.evaluation.attacks.records import AttackRecord, Attempt, record_of, up_to_success
from bdpo.evaluation.attacks.requests import Request
from bdpo.evaluation.engines.base import Sampling

_LONG_WORD = 3
"""Characters: only longer words are scrambled."""


def scramble(text: str, sigma: float, rng: Random) -> str:
    """With probability √σ each word of four letters or more, its first and last letter kept, is shuffled."""
    words = text.split(" ")
    return " ".join(_shuffled(word, rng) if rng.random() < sigma**0.5 else word for word in words)


def capitalise(text: str, sigma: float, rng: Random) -> str:
    """With probability √σ each letter changes its case."""
    return "".join(letter.swapcase() if rng.random() < sigma**0.5 else letter for letter in text)


def noise(text: str, sigma: float, rng: Random) -> str:
    """With probability σ³ each printable ASCII character becomes a neighbour in the code."""
    return "".join(_shifted(letter, rng) if rng.random() < sigma**3 else letter for letter in text)


AUGMENTATIONS: Mapping[str, Callable[[str, float, Random], str]] = {
    "scramble": scramble,
    "capitalise": capitalise,
    "noise": noise,
}
"""The augmentations in the order in which they are applied."""


def _shuffled(word: str, rng: Random) -> str:
    if len(word) <= _LONG_WORD:
        return word
    inside = list(word[1:-1])
    rng.shuffle(inside)
    return f"{word[0]}{''.join(inside)}{word[-1]}"


def _shifted(letter: str, rng: Random) -> str:
    if not " " < letter <= "~":
        return letter
    neighbours = [chr(ord(letter) + step) for step in (-1, 1) if " " < chr(ord(letter) + step) <= "~"]
    return rng.choice(neighbours)


@dataclass(frozen=True)
class BestOfN:
    """Each draw is decided by seed, request and number alone, so neither batches nor workers matter."""

    workplace: Workplace
    section: BestOfNConfig

    def __call__(self, request: Request) -> AttackRecord:
        """Draw until an answer is harmful, or n were drawn."""
        seed, own, attempts = self.workplace.config.seed, self.section, list[Attempt]()
        for first in range(0, own.n, own.batch_size):
            draws = range(first, min(first + own.batch_size, own.n))
            prompts = [self._prompt(request, draw) for draw in draws]
            sampling = Sampling(own.temperature, seed, list(draws))
            attempts += self.workplace.attacked.attempts(request, prompts, sampling=sampling)
            if any(attempt.succeeded for attempt in attempts):
                break
        return record_of(request.item_id, up_to_success(attempts))

    def _prompt(self, request: Request, draw: int) -> str:
        rng = Random(f"{self.workplace.config.seed} {request.item_id} {draw}")  # noqa: S311 (no secret)
        text = request.goal
        for name, augment in AUGMENTATIONS.items():
            if name in self.section.augmentations:
                text = augment(text, self.section.sigma, rng)
        return text


def _make(workplace: Workplace) -> Attack:
    section = workplace.config.attack
    assert isinstance(section, BestOfNConfig)  # noqa: S101 (its name chose this module)
    return BestOfN(workplace, section)


ATTACK = AttackKind("best_of_n", "best_of_n", "black_box", _make)
