"""The declaration of the configured attack. Attacks import torch, so no other is imported."""

from __future__ import annotations

from importlib import import_module

from bdpo.config import Config
from bdpo.evaluation.attacks.base import AttackKind


def attack_kind(config: Config) -> AttackKind:
    """The declaration of the configured attack."""
    kind: AttackKind = import_module(f"bdpo.evaluation.attacks.{config.attack.name}").ATTACK
    return kind
