"""Prefill: the assistant's turn is begun with a compliant answer, to several depths.

Qi et al., arXiv 2406.05946, section 2.3. The benchmark `prefill` measures the rate of each depth with its own
file; the attack asks whether any depth succeeds, for any benchmark's requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from bdpo.config.attack import PrefillAttackConfig
from bdpo.evaluation.attacks.base import Attack, AttackKind, Workplace
from bdpo.evaluation.attacks.records import AttackRecord, record_of, up_to_success
from bdpo.evaluation.attacks.requests import Request


@dataclass(frozen=True)
class Prefill:
    """Tries the depths from the least on, greedily."""

    workplace: Workplace
    section: PrefillAttackConfig

    def __call__(self, request: Request) -> AttackRecord:
        """Depths that the target is too short for are tried once: with all of it."""
        target = self.workplace.attacked.chat.prefill_ids(request.target)
        depths = sorted({min(tokens, len(target)) for tokens in self.section.tokens})
        begun = [target[:depth] for depth in depths]
        found = self.workplace.attacked.attempts(request, [request.goal] * len(begun), begun)
        return record_of(request.item_id, up_to_success(found))


def _make(workplace: Workplace) -> Attack:
    section = workplace.config.attack
    assert isinstance(section, PrefillAttackConfig)  # noqa: S101 (its name chose this module)
    return Prefill(workplace, section)


ATTACK = AttackKind("prefill", "prefill", "black_box", _make)
