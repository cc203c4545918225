"""TRL's DPOTrainer as a user gets it on a GPU, around small models on CPU.

Batches of `TRL_BATCH` pairs in the order of the data set, padded to their longest row, the output head on
response positions only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bdpo.models.tokenizer import EncodedPair
from benchmarks.common import MAX_LENGTH

TRL_BATCH = 8  # pairs; TRL's default per_device_train_batch_size

# On the CPU TRL runs its head on padding and prompts too; measured is what it does on a GPU.
trl.trainer.utils._use_triton = lambda device: True


def trl_trainer(model: Any, reference: Any = None) -> DPOTrainer:
    """TRL's trainer around models that are there already; with a reference it is a live one."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "<pad>": 1}, "a")), pad_token="<pad>", eos_token="<pad>"
    )
    arguments = DPOConfig(
        tempfile.mkdtemp(), bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[],
        precompute_ref_log_probs=reference is None, per_device_train_batch_size=TRL_BATCH,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a"}])
    return DPOTrainer(model, reference, arguments, train_dataset=rows, processing_class=words)


def trl_batches(pairs: list[EncodedPair]) -> Iterator[dict[str, torch.Tensor]]:
    """Pairs as TRL's collator pads them."""
    collate = DataCollatorForPreference(pad_token_id=1, max_length=MAX_LENGTH)
    for start in range(0, len(pairs), TRL_BATCH):
        yield collate(
            [
                {f"{part}_ids": ids for part, ids in pair._asdict().items()}
                for pair in pairs[start : start + TRL_BATCH]
            ]
        )
