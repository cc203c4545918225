"""The tokenizer of a folder, as transformers reads its files, and whether it has a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bdpo.errors import UserError, escaped, first_line
from bdpo.models.folders import OWN_CODE, read_json_object
from bdpo.models.loading import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What normalizers and pre-tokenizers of published models differ in: digits, spaces, line breaks, capitals,
# accents in one character and in two, contractions, code, scripts without spaces, signs of more than a byte.
_PROBE = (
    "In 1999 Ünï, nai\u0308ve Ça va?  x1 = [1, 22, 333, 4444];\n\n\tif (a_b != c) { return 'ŐK'; }\r\n"
    "I'll DON'T   12:34 3.14 ﬁ ① Ｆ 東京都 안녕 สวัสดี \u202fa\u00a0b 👩\u200d🔬…__--##1a2b "
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide which ids a text becomes, in the order of their names; templates are not among
    them."""
    patterns = ("*tok*", "vocab*", "merges*", "*.model")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


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
        tokenizer = _of_its_file(tokenizer, folder)
    except UserError:
        raise
    except Exception as error:  # of a class that reads what a file of somebody else holds
        if _has_own_code(folder):
            raise UserError(f"{folder}: the tokenizer {OWN_CODE} ({first_line(error)})") from None
        raise UserError(f"{folder}: no tokenizer can be loaded ({first_line(error)})") from None
    if is_empty:  # what transformers makes of no files
        raise UserError(f"{folder}: no tokenizer can be loaded (its vocabulary is empty)")
    if dropout := _dropout(tokenizer):
        raise UserError(
            f"{folder / 'tokenizer.json'}: model.dropout={dropout} would give a text other ids each time; "
            "set it to null"
        )
    if _has_own_code(folder) and not trust_remote_code:
        warn_once(
            f"{folder}: the tokenizer {OWN_CODE}; {type(tokenizer).__name__} of transformers takes its place"
        )
    return tokenizer


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str, remedy: str) -> None:
    """Make sure that a tokenizer has a chat template, and among several one to take.

    Raises:
        UserError: it has not; the message begins with `name` and ends with `remedy`.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise UserError(f"{name}: the tokenizer has no chat template; {remedy}")
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(map(escaped, templates))
        raise UserError(
            f"{name}: of the tokenizer's chat templates ({names}) none is called default; {remedy}"
        )


def _dropout(tokenizer: PreTrainedTokenizerBase) -> float | None:
    """How often the tokenizer leaves out a merge at random; of a kind without merges, or in Python, never."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return getattr(getattr(backend, "model", None), "dropout", None)


def _of_its_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, if it splits texts as its tokenizer.json says; else what that file says.

    Some classes of transformers 5 take vocabulary and merges from the file and bring their own normalizer and
    pre-tokenizer, whatever those of the file are. The model was trained with the file's.

    Raises:
        UserError: the class cannot write every text with that vocabulary, or neither it nor the class for all
            files does what the file says.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.is_fast or not file.is_file():
        return tokenizer
    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    name = type(tokenizer).__name__
    right = backend.encode(_PROBE, add_special_tokens=False).ids
    try:
        if _ids(tokenizer) == right:
            return tokenizer
    except Exception as error:  # of the class, or of the library's core, which raises nothing more special
        raise UserError(
            f"{folder}: tokenizer_class {name} does not fit tokenizer.json ({first_line(error)})"
        ) from None
    of_file: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    if _ids(of_file) != right:
        raise UserError(f"{folder}: tokenizer_class {name} splits texts otherwise than tokenizer.json says")
    warn_once(
        f"{folder}: tokenizer_class {name} of transformers splits texts otherwise than tokenizer.json says; "
        "the file is followed"
    )
    return of_file


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _has_own_code(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    own = read_json_object(file).get("auto_map") if file.is_file() else None
    return isinstance(own, dict) and "AutoTokenizer" in own
