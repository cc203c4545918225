"""Tokenizers and weights that are trained or saved here: small enough for a test or a demo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer


@contextmanager
def quiet_saving() -> Iterator[None]:
    """Hide the progress bar of `save_pretrained`, and what DeepSpeed prints when that imports it."""
    import torch
    from transformers.utils import logging

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def train_tokenizer(texts: Iterable[str], vocab_size: int, **settings: Any) -> Qwen2Tokenizer:
    """Qwen2's own byte-level BPE, trained on some texts; `settings` go to the tokenizer's class.

    That class, because beside a Qwen2 model AutoTokenizer rebuilds it whatever lies in the folder.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    raw = Qwen2Tokenizer().backend_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    bpe = json.loads(raw.to_str())["model"]
    merges: Any = [tuple(merge) for merge in bpe["merges"]]  # its annotation knows only the old form
    return Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, **settings)
