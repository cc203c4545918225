"""One pass of the reference model over the pairs, which computes all that training and search need of it.

For each pair: four sums of log-probs (both responses, with and without the query), the mutual information
computed from them, and CHES, the similarity of the two responses' hidden states. None of these depends on
alpha, beta or training, so all trials share one scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from bdpo.config import Config
from bdpo.data.pairs import encoded_pairs
from bdpo.method.ches import ches
from bdpo.method.mi import mutual_information
from bdpo.models.attention import attention_of
from bdpo.models.loading import load_model, model_folder
from bdpo.models.logps import LogpsModel, pair_groups
from bdpo.models.oom import out_of_memory
from bdpo.models.packing import PrefixGroup, length_sorted_batches
from bdpo.models.tokenizer import EncodedPair, load_tokenizer
from bdpo.scoring.scores import SCORE_SCHEMA


class ReferenceScorer:
    """The frozen reference model; `score` computes the columns of the score table."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.chat = load_tokenizer(config.model)
        attention = attention_of(config, torch.device(device))
        model = load_model(model_folder(config.model), config.model, attention)
        self.model = LogpsModel(model, config.data.max_length).to(device).eval()
        self.unconditional = self.chat.unconditional_ids(config.score.unconditional)

    def score(self, pairs: pa.Table) -> pa.Table:
        """Rows of PAIR_SCHEMA -> rows of SCORE_SCHEMA, in the same order.

        Raises:
            FloatingPointError: a log-prob is not finite. Another pair of the same batch may be the cause: a
                masked token contributes 0 times its value, which is not a number if the value is infinite.
        """
        encoded = encoded_pairs(pairs)
        logps, ches_values = reference_logps(
            self.model, encoded, self.unconditional, self.config.score.tokens_per_batch
        )
        if not torch.stack(list(logps.values())).isfinite().all():
            raise FloatingPointError(f"a log-prob is not finite with model.dtype={self.config.model.dtype}")
        columns: dict[str, Any] = {
            "pair_id": pairs["pair_id"],
            "group": pairs["group"],
            "prompt_tokens": torch.tensor([len(pair.prompt) for pair in encoded]),
            "chosen_tokens": torch.tensor([len(pair.chosen) for pair in encoded]),
            "rejected_tokens": torch.tensor([len(pair.rejected) for pair in encoded]),
            **logps,
        }
        for side in ("chosen", "rejected"):
            columns[f"mi_{side}"] = mutual_information(
                logps[f"ref_{side}_logps"], logps[f"uncond_{side}_logps"], columns[f"{side}_tokens"]
            )
        columns = {name: c.numpy() if isinstance(c, torch.Tensor) else c for name, c in columns.items()}
        columns["ches"] = pa.array(ches_values.numpy(), from_pandas=True)
        return pa.table(columns, schema=SCORE_SCHEMA)


@torch.inference_mode()
def reference_logps(
    model: LogpsModel, pairs: Sequence[EncodedPair], unconditional: list[int], tokens_per_batch: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The four sums of log-probs of every pair, by column name, in nats, and CHES, NaN if it is unknown.

    All are float32 on the CPU, shape (pairs,). When memory runs out, the remaining batches are planned again
    with half the tokens.
    """
    ches_values = torch.empty(len(pairs))

    def in_batches(groups: Sequence[PrefixGroup], means: bool = False) -> torch.Tensor:
        logps = torch.empty(len(groups), len(groups[0].responses))
        lengths = [group.tokens(model.shared_rows) for group in groups]
        batches = length_sorted_batches(lengths, tokens_per_batch)
        while batches:
            scored = _forward_within_memory(model, [groups[i] for i in batches[0]], means)
            if scored is None:
                batches = _replanned_with_half_the_tokens(batches, lengths)
            else:
                batch, *batches = batches
                if means:
                    scored, states = scored
                    ches_values[batch] = ches(*states.unflatten(0, (-1, 2)).unbind(1)).cpu()
                logps[batch] = scored.view(len(batch), -1).cpu()
        return logps.view(-1, 2)

    ref = in_batches(pair_groups(pairs), means=True)
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    uncond = in_batches([PrefixGroup(unconditional, [response]) for response in responses])
    return {
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
        "uncond_chosen_logps": uncond[:, 0],
        "uncond_rejected_logps": uncond[:, 1],
    }, ches_values


def _forward_within_memory(model: LogpsModel, groups: Sequence[PrefixGroup], means: bool) -> Any:
    """The model's outputs; None if memory does not suffice for several groups, an exception for one."""
    try:
        return model(groups, means=means)
    except (RuntimeError, MemoryError) as error:
        if len(groups) == 1 or not out_of_memory(error):
            raise
    # Outside the handler: the exception keeps the frames alive, and the frames keep the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _replanned_with_half_the_tokens(batches: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The same indices in batches of at most half the tokens of the first batch."""
    rest = [index for batch in batches for index in batch]
    budget = lengths[rest[0]] * len(batches[0]) // 2
    smaller = length_sorted_batches([lengths[index] for index in rest], budget)
    return [[rest[place] for place in batch] for batch in smaller]
