"""Tokenizers with the shapes that families of models have: byte-level BPE, and SentencePiece's.

`takes` are the sides on which their special tokens take the spaces beside them: "lstrip", "rstrip".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_level(
    special: Sequence[str],
    words: Sequence[str] = (),
    bos: str | None = None,
    eos: str | None = None,
    takes: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A token a byte; `special` are added tokens, `words` are added tokens that are not special.

    Only `bos` and `eos` are *named* special tokens, as in Phi-3 and Gemma 3.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, special, words, (bos, eos), takes)


def sentence_piece(
    special: Sequence[str],
    bos: str | None = None,
    eos: str | None = None,
    prepend: str = "first",
    takes: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A token a character, `▁` for a space, and one put before a text (Llama 2, Vicuna, Mistral v0.1).

    `prepend` is the scheme of Metaspace, or "normalizer" for a normalizer that does it (Phi-3).
    """
    characters = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
    vocabulary = {character: i for i, character in enumerate(characters)}
    merges = [("▁", letter) for letter in "BYbx"]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if prepend == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(tokenizer, special, (), (bos, eos), takes)


def _with_added(
    tokenizer: Tokenizer,
    special: Sequence[str],
    words: Sequence[str],
    named: tuple[str | None, str | None],
    takes: Sequence[str],
) -> PreTrainedTokenizerFast:
    sides: dict[str, Any] = dict.fromkeys(takes, True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, **sides) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in words])
    bos, eos = named
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
