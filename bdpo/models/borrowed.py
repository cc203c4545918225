"""A loaded model and tokenizer that belong to the caller: checked, used, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bdpo.models.tokenizer import ChatTokenizer, faithful_chat, require_embedded
from bdpo.models.tokenizer_files import require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def borrowed_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> ChatTokenizer:
    """The tokenizer of a loaded model, after the checks of one that is loaded from a folder.

    Raises:
        TypeError: the model is not a PreTrainedModel of transformers, as a PeftModel is not.
        UserError: the tokenizer has no chat template or one that cannot be used, or more tokens than the
            model has embeddings.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expects a PreTrainedModel of transformers, not a {type(model).__name__}")
    require_chat_template(tokenizer, "tokenizer", "set tokenizer.chat_template")
    chat = faithful_chat(tokenizer, template_kwargs, "tokenizer")
    require_embedded(tokenizer, model.config, "tokenizer")
    return chat


@contextmanager
def in_evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout; afterwards it and each of its parts are in their modes of before."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
