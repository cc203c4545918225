"""Greedy coordinate gradient: a suffix behind which the model begins to comply.

Zou et al., "Universal and Transferable Adversarial Attacks on Aligned Language Models", arXiv 2307.15043:
algorithm 1 for one request, algorithm 2 for several, added one by one as the suffix succeeds on all so far
(github.com/llm-attacks/llm-attacks). The state of a search is kept every `attack.check_steps` steps, and all
chance is drawn from seed, request and step: a search that is resumed goes the same way.

Differences: the request alone and the initial suffix are asked before the first step, and the record is that
of the most harmful answer of all; an end by the judge's verdict on a greedy answer, not by a list of phrases;
candidates are printable ASCII whose text is tokenised to the same ids in the complete prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from bdpo.config import Config
from bdpo.config.attack import GcgConfig
from bdpo.errors import UserError
from bdpo.evaluation.attacks.base import Attack, AttackKind, Workplace
from bdpo.evaluation.attacks.coordinate import candidate_losses, stable_candidates, token_gradient
from bdpo.evaluation.attacks.records import (
    AttackRecord,
    Attempt,
    direct_record,
    joined,
    record_of,
    with_cost_of,
)
from bdpo.evaluation.attacks.requests import Request, load_requests
from bdpo.evaluation.attacks.suffixes import SuffixedPrompt, candidate_tokens, stable_text, suffix_text
from bdpo.models.template import Message
from bdpo.storage.paths import StoragePath, read_text, write_text


@dataclass(frozen=True)
class State:
    """How far a search is: a JSON file, private, for its ids are a suffix."""

    suffix: list[int]
    best: list[int]
    """The suffix of least loss over the requests that are active now."""
    best_loss: float | None = None
    step: int = 0
    active: int = 1
    """How many of the requests the suffix is made with so far."""
    succeeded: bool = False
    """Whether the judge called the greedy answers to all requests harmful."""
    stuck: bool = False
    """Whether no stable candidate was found: the search ended there."""
    forward_passes: int = 0
    record: AttackRecord = field(default_factory=lambda: AttackRecord(""))
    """The most harmful answer so far, and what all answers took."""


@dataclass(frozen=True)
class Gcg:
    """One suffix a request, or with `attack.universal` the one that `prepare` made."""

    workplace: Workplace
    section: GcgConfig

    def __call__(self, request: Request) -> AttackRecord:
        """The record of the most harmful answer, with all that the search took."""
        if self.section.universal:
            return self._with_universal(request)
        direct = direct_record(request, self.workplace.attacked.attempt(request, request.goal))
        if direct.jailbroken:
            return direct
        prompt = self._prompt(request)
        if prompt is None:
            return replace(direct, **self._why_no_search(request))
        state = self.search([prompt], request.item_id)
        if not (state.succeeded or self._was_asked(state)):
            state = _with_answers(state, self._attempts([prompt], state.best))
        return _with_cost(joined(direct, state.record), state)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Make the universal suffix, and keep it in the state folder.

        Raises:
            UserError: `attack.initial_suffix` is not stable behind any of the requests.
        """
        prompts = [prompt for prompt in map(self._prompt, self._trained_on(requests)) if prompt is not None]
        if not prompts:
            raise UserError(
                "attack.initial_suffix: with this tokenizer and template its text is not tokenised apart "
                "from the requests; give another one"
            )
        self.search(prompts, "universal")

    def search(self, prompts: Sequence[SuffixedPrompt], key: str) -> State:
        """The final state of the search for a suffix in these prompts, resumed from the state file `key`."""
        state = self._saved(key) or self._checked(prompts, self._first_state())
        passes = self.section.candidates + 1
        while not (state.succeeded or state.stuck):
            if state.forward_passes + state.active * passes > self.section.forward_passes:
                break
            state = self._step(prompts[: state.active], state, key)
            if state.step % self.section.check_steps == 0:
                state = self._checked(prompts, state)
                self._save(key, state)
        self._save(key, state)
        return state

    def _step(self, prompts: Sequence[SuffixedPrompt], state: State, key: str) -> State:
        """The candidate of least loss over the active requests takes the suffix's place, as in the paper."""
        attacked, own = self.workplace.attacked, self.section
        gradient = sum(token_gradient(attacked.logps, prompt, state.suffix) for prompt in prompts)
        assert isinstance(gradient, torch.Tensor)  # noqa: S101 (there is a prompt)
        gradient[:, ~self._allowed.to(gradient.device)] = torch.inf
        step_key = f"{self.workplace.config.seed} {key} {state.step}"
        shape = (own.candidates, own.top_k)
        candidates = stable_candidates(attacked.chat, prompts, gradient, state.suffix, shape, step_key)
        if not candidates:
            return replace(state, stuck=True)
        losses = torch.stack(
            [
                candidate_losses(attacked.logps, prompt, state.suffix, candidates, own.tokens_per_batch)
                for prompt in prompts
            ]
        ).mean(0)
        chosen, loss = candidates[int(losses.argmin())], float(losses.min())
        better = state.best_loss is None or loss < state.best_loss
        return replace(
            state,
            suffix=chosen,
            best=chosen if better else state.best,
            best_loss=loss if better else state.best_loss,
            step=state.step + 1,
            forward_passes=state.forward_passes + len(prompts) * (len(candidates) + 1),
        )

    def _checked(self, prompts: Sequence[SuffixedPrompt], state: State) -> State:
        """After greedy answers to the active requests: the next joins when all of them are harmful."""
        attempts = self._attempts(prompts[: state.active], state.suffix)
        state = _with_answers(state, attempts)
        if not all(attempt.succeeded for attempt in attempts):
            return state
        if state.active == len(prompts):
            return replace(state, best=state.suffix, succeeded=True)
        return replace(state, active=state.active + 1, best=state.suffix, best_loss=None)

    def _was_asked(self, state: State) -> bool:
        """Whether the suffix of least loss is the one that was checked last."""
        return state.best == state.suffix and state.step % self.section.check_steps == 0

    def _attempts(self, prompts: Sequence[SuffixedPrompt], suffix: Sequence[int]) -> list[Attempt]:
        """Greedy answers to requests with a suffix behind each."""
        attacked = self.workplace.attacked
        return [
            attacked.attempt(prompt.request, prompt.request.goal + suffix_text(attacked.chat, prompt, suffix))
            for prompt in prompts
        ]

    def _with_universal(self, request: Request) -> AttackRecord:
        """The record of the suffix that `prepare` made, whose rate is what is asked for, so of it alone."""
        state = self._saved("universal")
        if state is None:
            return AttackRecord(request.item_id, **self._why_no_search(request))
        direct = direct_record(request, self.workplace.attacked.attempt(request, request.goal))
        prompt = self._prompt(request)
        if prompt is None:
            record = replace(direct, **self._why_no_search(request))
        else:
            record = record_of(request.item_id, self._attempts([prompt], state.best))
            record = replace(with_cost_of(record, direct), direct=direct.direct)
        first, *others = self._trained_on(self._all_requests)
        if request.item_id == first.item_id:  # so that the sum over requests is what the suffix took
            return _with_cost(with_cost_of(record, state.record), state)
        return replace(record, held_out=request.item_id not in {other.item_id for other in others})

    def _why_no_search(self, request: Request) -> Mapping[str, Any]:
        """No suffix was tried: the prompt is too long, or a suffix merges with what is around it.

        So the request was not withstood, whatever the answer to it alone was.
        """
        chat = self.workplace.attacked.chat
        prompt = chat.prompt_ids([Message(role="user", content=request.goal + self._first_text)])
        target = chat.prefill_ids(request.target)[: self.section.target_tokens]
        fits = self.workplace.attacked.fits(len(prompt) + len(target))
        reason = "unstable_suffix" if fits else "prompt_too_long"
        return {"jailbroken": None, "harm": None, "failure": None, "unanswered": reason}

    def _prompt(self, request: Request) -> SuffixedPrompt | None:
        """None if the initial suffix is not stable in the request's prompt, or leaves no room."""
        chat, tokens = self.workplace.attacked.chat, self.section.target_tokens
        prompt = SuffixedPrompt.of(chat, request, self._first_text, tokens)
        ids = chat.text_ids(self._first_text, continues=True)
        return prompt if prompt is not None and self.workplace.attacked.fits(prompt.tokens(ids)) else None

    @property
    def _first_text(self) -> str:
        return f" {self.section.initial_suffix.strip()}"

    def _first_state(self) -> State:
        ids = self.workplace.attacked.chat.text_ids(self._first_text, continues=True)
        return State(ids, ids)

    def _trained_on(self, requests: Sequence[Request]) -> Sequence[Request]:
        return requests[: self.section.train_requests]

    @cached_property
    def _all_requests(self) -> list[Request]:
        return load_requests(self.workplace.config)

    @cached_property
    def _allowed(self) -> torch.Tensor:
        attacked = self.workplace.attacked
        weight = attacked.logps.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)  # noqa: S101 (so it is in every causal model)
        return candidate_tokens(attacked.chat, len(weight))

    def _file(self, key: str) -> StoragePath:
        return self.workplace.state / f"{key}.json"

    def _save(self, key: str, state: State) -> None:
        content = {"fingerprint": self.workplace.fingerprint, **asdict(state)}
        write_text(self._file(key), json.dumps(content) + "\n", 0o600)

    def _saved(self, key: str) -> State | None:
        """The state of the file; None without one, or if it was made with other inputs."""
        try:
            content = json.loads(read_text(self._file(key)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if content.pop("fingerprint", None) != self.workplace.fingerprint:
            return None
        return State(**{**content, "record": AttackRecord(**content["record"])})


def _with_answers(state: State, attempts: Sequence[Attempt]) -> State:
    """The state after further answers."""
    return replace(state, record=joined(state.record, record_of(state.record.item_id, attempts)))


def _with_cost(record: AttackRecord, state: State) -> AttackRecord:
    """The record with the forward passes of the search, its least loss, and whether it ended early."""
    return replace(record, forward_passes=state.forward_passes, loss=state.best_loss, stuck=int(state.stuck))


def _make(workplace: Workplace) -> Gcg:
    section = workplace.config.attack
    assert isinstance(section, GcgConfig)  # noqa: S101 (its name chose this module)
    return Gcg(workplace, section)


def _attack(workplace: Workplace) -> Attack:
    return _make(workplace)


def _prepare(workplace: Workplace, requests: Sequence[Request]) -> None:
    _make(workplace).prepare(requests)


def _check(config: Config) -> None:
    """The initial suffix is a line of text, and the budget is enough for a step."""
    section = config.attack
    assert isinstance(section, GcgConfig)  # noqa: S101
    if section.forward_passes <= section.candidates:
        raise UserError(
            f"attack.forward_passes={section.forward_passes}: a step of "
            f"attack.candidates={section.candidates} takes {section.candidates + 1}"
        )
    from bdpo.models.tokenizer import load_tokenizer

    if section.universal and (asked := len(load_requests(config))) <= section.train_requests:
        raise UserError(
            f"attack.train_requests={section.train_requests}: leaves none of the {asked} requests to try the "
            "universal suffix on"
        )
    if not stable_text(f" {section.initial_suffix.strip()}", load_tokenizer(config.model)):
        raise UserError("attack.initial_suffix: expects one line of printable text, without control tokens")


def _is_universal(config: Config) -> bool:
    return isinstance(config.attack, GcgConfig) and config.attack.universal


ATTACK = AttackKind("gcg", "GCG", "white_box", _attack, _check, _is_universal, _prepare)
