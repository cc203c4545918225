"""Prepared pairs against the chat template: what was encoded is what the template itself writes.

A template is checked with a probe when it is loaded (`bdpo.models.tokenizer`), and every row when it is
rendered (`bdpo.data.rendering`). Pairs may have been prepared long before, by another template or tokenizer;
so every run compares some of its pairs, text for text and id for id, with what the template writes now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import TemplateError

from bdpo.config import DataConfig
from bdpo.data.formats.base import BadRow
from bdpo.data.pairs import pair_of
from bdpo.data.rendering import arguments_of, render_pair
from bdpo.errors import UserError, first_line
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer


def require_faithful_pairs(chat: ChatTokenizer, rows: Iterable[Mapping[str, Any]], data: DataConfig) -> int:
    """Make sure that prepared pairs are what the template writes, with the ids of their texts.

    Every pair is rendered with its tools, its variables and all keys of its messages. Returns how many pairs
    were compared.

    Raises:
        UserError: it is not so for one of them, which is named by its id, since its text is private; or
            there are none.
    """
    compared = 0
    for row in rows:
        _require_faithful(chat, row, data)
        compared += 1
    if not compared:
        raise UserError("no prepared pair was compared with the chat template; prepare them with fresh=true")
    return compared


def _require_faithful(chat: ChatTokenizer, row: Mapping[str, Any], data: DataConfig) -> None:
    pair, name = pair_of(row), f"pair {row['pair_id']}"
    try:
        rendered = render_pair(chat, pair)
        prompt_ids = chat.text_ids(rendered.prompt)
        for side in ("chosen", "rejected"):
            message: Message = getattr(pair, side)
            response: str = getattr(rendered, side)
            whole = chat.template.render([*pair.prompt, message], False, arguments_of(pair))
            ids = [*(chat.answer_ids(response) or []), chat.end_of_turn_id]
            if not chat.begins(whole, rendered.prompt + response, prompt_ids + ids):
                raise UserError(
                    f"{name}, {side}: the chat template does not write prompt, response and end of turn "
                    "at the beginning of the whole conversation; set model.chat_template to one that does "
                    "(docs/data.md, The fidelity check)"
                )
            prepared = [row["prompt_ids"], row[f"{side}_ids"]]
            if prepared != [prompt_ids, ids[: data.max_length - len(prompt_ids)]]:
                raise UserError(
                    f"{name}, {side}: the prepared token ids are not those of its text; prepare the pairs "
                    "again with fresh=true"
                )
    except (BadRow, TemplateError) as error:
        raise UserError(
            f"{name}: was prepared, but cannot be rendered now ({first_line(error)}); prepare the pairs "
            "again with fresh=true"
        ) from None
