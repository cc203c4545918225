"""Tokenizers with the shapes that families of models have: byte-level BPE, and SentencePiece's."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_level(
    special: Sequence[str], words: Sequence[str] = (), bos: str | None = None, eos: str | None = None
) -> PreTrainedTokenizerFast:
    """A token a byte; `special` are added tokens, `words` are added tokens that are not special.

    Only `bos` and `eos` are *named* special tokens, as in Phi-3 and Gemma 3.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, special, words, bos, eos)


def sentence_piece(
    special: Sequence[str], bos: str | None = None, eos: str | None = None, prepend: str = "first"
) -> PreTrainedTokenizerFast:
    """A token a character, `▁` for a space, and one put before a text (Llama 2, Vicuna, Mistral v0.1)."""
    characters = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    merges = [("▁", letter) for letter in "BYbx"]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(tokenizer, special, (), bos, eos)


def _with_added(
    tokenizer: Tokenizer, special: Sequence[str], words: Sequence[str], bos: str | None, eos: str | None
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
