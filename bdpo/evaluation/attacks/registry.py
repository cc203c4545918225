"""All attacks by name."""

from __future__ import annotations

from importlib import import_module

from bdpo.config import Config
from bdpo.config.attack import ATTACK_NAMES
from bdpo.evaluation.attacks.base import AttackKind

ATTACKS: dict[str, AttackKind] = {
    name: import_module(f"bdpo.evaluation.attacks.{name}").ATTACK for name in ATTACK_NAMES
}


def attack_kind(config: Config) -> AttackKind:
    """The declaration of the configured attack."""
    return ATTACKS[config.attack.name]
