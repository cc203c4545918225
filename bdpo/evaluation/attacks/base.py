"""What an attack is: its declaration, and what it is made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from bdpo.config import Config
from bdpo.evaluation.attacks.records import AttackRecord
from bdpo.evaluation.attacks.requests import Request
from bdpo.storage.paths import StoragePath

if TYPE_CHECKING:
    from bdpo.evaluation.attacks.attacked import AttackedModel


@dataclass(frozen=True)
class Workplace:
    """What an attack is made with besides its config: the model, and where it may keep its state."""

    config: Config
    attacked: AttackedModel
    state: StoragePath
    """A private folder for the state of attacks that take long."""
    fingerprint: str
    """The digest of all inputs: a state of other inputs is not resumed."""


class Attack(Protocol):
    """An attack of one kind, ready to be tried."""

    def __call__(self, request: Request) -> AttackRecord:
        """Attack the model with one request."""
        ...


@dataclass(frozen=True)
class AttackKind:
    """The declaration of an attack: its module ends with one, called `ATTACK`."""

    name: str
    """Value of `attack.name`."""
    label: str
    """`parameters.method` of its artifacts."""
    access: Literal["white_box", "black_box"]
    """Whether it looks at weights: `parameters.attack_type` of its artifacts."""
    make: Callable[[Workplace], Attack]
    check: Callable[[Config], None] = lambda config: None
    """Raises a UserError if it cannot be made, before the first request."""
    prepares: Callable[[Config], bool] = lambda config: False
    """Whether something is made once, before the first request."""
    prepare: Callable[[Workplace, Sequence[Request]], None] = lambda workplace, requests: None
    """Makes that, and keeps it in the state folder."""
