"""Preference file formats: one raw row -> the common pair.

A format is a pure function of a row. It refuses a row it cannot read (`BadRow`) and drops one that its
own rule leaves out (`Excluded`). Reading files and checking what a pair says is left to `bdpo.data.prepare`.
Reasons name a column, never its content: prompts and responses may be harmful text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, TypedDict

from bdpo.errors import UserError
from bdpo.models.template import Message

Row = Mapping[str, Any]

Group = Literal["safe", "unsafe"]


class Pair(TypedDict):
    """A preference pair, whatever file it came from; `group` tells what kind of query the prompt is."""

    prompt: list[Message]
    chosen: str
    rejected: str
    group: Group | None
    chosen_safe: bool | None
    rejected_safe: bool | None


class BadRow(ValueError):
    """The row cannot be used and is quarantined; the message is a short fixed phrase."""


class Excluded(ValueError):
    """The format's own rule leaves this sound row out; it is counted apart from bad rows."""


def preference(row: Row) -> Pair:
    """TRL's preference format (`docs/source/dataset_formats.md`), prompt explicit or implicit.

    Explicit: `prompt` and both responses are each a text or a list of messages; a response holds exactly
    one assistant message. Implicit: `chosen` and `rejected` are whole conversations that share all but
    the last, assistant, turn; for an implicit prompt in plain texts see `preference_text`.
    Optional columns: `group`, `chosen_safe`, `rejected_safe`.
    """
    if "prompt" in row:
        prompt = _prompt(row)
        chosen, rejected = _response(row, "chosen"), _response(row, "rejected")
    elif isinstance(row.get("chosen"), str):
        raise BadRow("prompt: missing")
    else:
        prompt, chosen, rejected = _split(_messages(row, "chosen"), _messages(row, "rejected"))
    group = row.get("group")
    if group not in ("safe", "unsafe", None):
        raise BadRow("group: neither safe, unsafe nor null")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        group=group,
        chosen_safe=_boolean(row, "chosen_safe") if row.get("chosen_safe") is not None else None,
        rejected_safe=_boolean(row, "rejected_safe") if row.get("rejected_safe") is not None else None,
    )


def preference_text(row: Row) -> Pair:
    """TRL's preference format with an implicit prompt in plain texts: what both begin with is the prompt.

    As TRL's `extract_prompt`, it is cut between words. A format of its own, so that a row of the explicit
    format that has lost its prompt is bad instead of being cut somewhere.
    """
    chosen, rejected = _text(row, "chosen").split(" "), _text(row, "rejected").split(" ")
    shared = sum(
        1 for _ in takewhile(lambda words: words[0] == words[1], zip(chosen, rejected, strict=False))
    )
    if not shared:
        raise BadRow("prompt: chosen and rejected have no first word in common")
    prompt = Message(role="user", content=" ".join(chosen[:shared]))
    return _unlabelled([prompt], " ".join(chosen[shared:]), " ".join(rejected[shared:]))


def sharegpt(row: Row) -> Pair:
    """LLaMA-Factory's ShareGPT ranking format (`data/README.md`): turns are {from, value}.

    A non-empty `system` column becomes the first message.
    """
    prompt = _turns(_list(row, "conversations"), "conversations")
    if row.get("system"):
        prompt.insert(0, Message(role="system", content=_text(row, "system")))
    responses = {}
    for column in ("chosen", "rejected"):
        (message,) = _turns([_cell(row, column)], column)
        if message["role"] != "assistant":
            raise BadRow(f"{column}: not an assistant's turn")
        responses[column] = message["content"]
    return _unlabelled(prompt, responses["chosen"], responses["rejected"])


def pku_saferlhf(row: Row) -> Pair:
    """PKU-SafeRLHF: two responses, each labelled safe or not. The query itself has no label.

    Exactly one response safe: an unsafe query, the safe response is chosen. Both safe: a safe query,
    `better_response_id` is chosen.

    Raises:
        Excluded: both responses are unsafe, so there is nothing to prefer.
    """
    prompt = [Message(role="user", content=_text(row, "prompt"))]
    responses = [_text(row, "response_0"), _text(row, "response_1")]
    safe = [_boolean(row, "is_response_0_safe"), _boolean(row, "is_response_1_safe")]
    if not any(safe):
        raise Excluded("both responses unsafe")
    better = _response_id(row, "better_response_id") if all(safe) else safe.index(True)
    return Pair(
        prompt=prompt,
        chosen=responses[better],
        rejected=responses[1 - better],
        group="safe" if all(safe) else "unsafe",
        chosen_safe=safe[better],
        rejected_safe=safe[1 - better],
    )


def hh_rlhf(row: Row) -> Pair:
    """Anthropic's HH-RLHF: two `\\n\\nHuman: …\\n\\nAssistant: …` transcripts that share all but one turn."""
    return _unlabelled(*_split(_transcript(row, "chosen"), _transcript(row, "rejected")))


FORMATS: dict[str, Callable[[Row], Pair]] = {
    "preference": preference,
    "preference_text": preference_text,
    "sharegpt": sharegpt,
    "pku_saferlhf": pku_saferlhf,
    "hh_rlhf": hh_rlhf,
}

_WANTED = {
    "preference": "prompt,chosen,rejected, or chosen,rejected as conversations",
    "preference_text": "chosen,rejected as texts that begin with the prompt",
    "sharegpt": "conversations,chosen,rejected",
    "pku_saferlhf": "prompt,response_0,response_1,is_response_0_safe,is_response_1_safe,better_response_id",
    "hh_rlhf": "chosen,rejected as transcripts of Human: and Assistant:",
}


def detect(rows: Sequence[Row], source: str) -> str:
    """The one format that the columns of some sample rows fit; `source` is what an error names.

    Raises:
        UserError: they fit no format, or more than one.
    """
    fitting = sorted({name for row in rows for name in FORMATS if _fits(name, row)})
    if len(fitting) > 1:  # a bad row of any other format may look like this one
        fitting = [name for name in fitting if name != "preference_text"]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{source}: columns fit the formats {' and '.join(fitting)}; set data.format")
    wanted = "; ".join(f"{name} wants {columns}" for name, columns in _WANTED.items())
    raise UserError(f"{source}: columns {_known(rows)} fit no known format ({wanted})")


def _known(rows: Sequence[Row]) -> str:
    """The columns that some format knows; another name may be a text, in a file without a header."""
    columns = {str(column) for row in rows for column in row}
    known = sorted(columns & {name for names in _WANTED.values() for name in names.split(",")})
    others = len(columns) - len(known)
    return ",".join(known + ([f"{others} unknown"] if others else [])) or "(none)"


def _fits(name: str, row: Row) -> bool:
    if name in ("sharegpt", "pku_saferlhf"):
        return set(_WANTED[name].split(",")) <= row.keys()
    if not {"chosen", "rejected"} <= row.keys():
        return False
    chosen = row["chosen"]
    if name == "preference_text":
        return row.keys() == {"chosen", "rejected"} and isinstance(chosen, str)
    if name == "hh_rlhf":
        return "prompt" not in row and isinstance(chosen, str) and bool(_SPEAKER.match(chosen))
    return "prompt" in row or ("conversations" not in row and isinstance(chosen, list))


def _unlabelled(prompt: list[Message], chosen: str, rejected: str) -> Pair:
    return Pair(
        prompt=prompt, chosen=chosen, rejected=rejected, group=None, chosen_safe=None, rejected_safe=None
    )


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise BadRow(f"{column}: missing")
    if row[column] is None:
        raise BadRow(f"{column}: null")
    return row[column]


def _text(row: Row, column: str) -> str:
    return _utf8(_cell(row, column), column)


def _utf8(value: object, column: str) -> str:
    if value is None:
        raise BadRow(f"{column}: null")
    if not isinstance(value, str):
        raise BadRow(f"{column}: wrong type")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape and UTF-8 cannot hold
        raise BadRow(f"{column}: not UTF-8") from None
    return value


def _boolean(row: Row, column: str) -> bool:
    value = _cell(row, column)
    if not isinstance(value, bool):
        raise BadRow(f"{column}: wrong type")
    return value


def _response_id(row: Row, column: str) -> int:
    value = _cell(row, column)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRow(f"{column}: wrong type")
    if value not in (0, 1):
        raise BadRow(f"{column}: neither 0 nor 1")
    return value


def _list(row: Row, column: str) -> list[Any]:
    value = _cell(row, column)
    if not isinstance(value, list):
        raise BadRow(f"{column}: wrong type")
    return value


_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}

_SHAREGPT_ROLES = _ROLES | {"human": "user", "gpt": "assistant"}


def _read_turns(
    turns: list[Any], column: str, role: str, content: str, roles: dict[str, str]
) -> list[Message]:
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow(f"{column}: wrong type")
        for key in (role, content):
            if key not in turn:
                raise BadRow(f"{column}: a turn without {key}")
        name = roles.get(_utf8(turn[role], column))
        if name is None:
            raise BadRow(f"{column}: unknown role")
        messages.append(Message(role=name, content=_utf8(turn[content], column)))
    return messages


def _turns(turns: list[Any], column: str) -> list[Message]:
    return _read_turns(turns, column, "from", "value", _SHAREGPT_ROLES)


def _messages(row: Row, column: str) -> list[Message]:
    return _read_turns(_list(row, column), column, "role", "content", _ROLES)


def _prompt(row: Row) -> list[Message]:
    if isinstance(row["prompt"], str):
        return [Message(role="user", content=_text(row, "prompt"))]
    return _messages(row, "prompt")


def _response(row: Row, column: str) -> str:
    if isinstance(row.get(column), str):
        return _text(row, column)
    messages = _messages(row, column)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow(f"{column}: not exactly one assistant message")
    return messages[0]["content"]


def _split(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """Two conversations that share all but their last turn -> prompt and both responses."""
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow(f"{column}: does not end with an assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("prompt: differs between chosen and rejected")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


_SPEAKER = re.compile(r"\s*(Human|Assistant):")

_NEXT_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _transcript(row: Row, column: str) -> list[Message]:
    before, *parts = _NEXT_SPEAKER.split(_text(row, column))
    if before.strip() or not parts:
        raise BadRow(f"{column}: not a transcript of Human: and Assistant:")
    return [
        Message(role="user" if speaker == "Human" else "assistant", content=content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
