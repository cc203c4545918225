"""The tokenizer of a folder, as transformers reads its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bdpo.errors import UserError, first_line
from bdpo.models.folders import OWN_CODE, read_json_object
from bdpo.models.loading import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, an adapter or a judge.

    Raises:
        UserError: there is none, its files are damaged, or it brings its own code, which is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        is_empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # of a class that reads what a file of somebody else holds
        if _has_own_code(folder):
            raise UserError(f"{folder}: the tokenizer {OWN_CODE} ({first_line(error)})") from None
        raise UserError(f"{folder}: no tokenizer can be loaded ({first_line(error)})") from None
    if is_empty:  # what transformers makes of no files
        raise UserError(f"{folder}: no tokenizer can be loaded (its vocabulary is empty)")
    if _has_own_code(folder) and not trust_remote_code:
        warn_once(
            f"{folder}: the tokenizer {OWN_CODE}; {type(tokenizer).__name__} of transformers takes its place"
        )
    return tokenizer


def _has_own_code(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    own = read_json_object(file).get("auto_map") if file.is_file() else None
    return isinstance(own, dict) and "AutoTokenizer" in own
