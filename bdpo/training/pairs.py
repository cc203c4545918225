"""The pairs that a training worker reads, joined with their scores and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from bdpo.config import Config
from bdpo.data.pairs import ID_COLUMNS, LABELS, count_pairs, encoded_pairs, read_pairs
from bdpo.method.base import PairLogps
from bdpo.models.loading import model_config
from bdpo.models.logps import pair_logps, prefix_sharing_obstacle
from bdpo.models.packing import PairLayout
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer
from bdpo.storage.run_dir import RunDir
from bdpo.training.batches import draw_held_out


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs and their scores, row by row; tensors have shape (pairs,), and unknown values are NaN."""

    config: Config
    chat: ChatTokenizer
    table: pa.Table
    scores: pa.Table
    weight_chosen: torch.Tensor
    weight_rejected: torch.Tensor
    layout: PairLayout

    @classmethod
    def load(cls, config: Config, run: RunDir, scores: pa.Table) -> TrainingPairs:
        """Join `scores` (of all or some of the prepared pairs) with the pairs; compute the method's weights.

        Raises:
            RuntimeError: a score belongs to no prepared pair.
        """
        columns = ["pair_id", *LABELS, *ID_COLUMNS]  # no text: the ids are all that the model sees
        table = read_pairs(run.pairs, 0, count_pairs(run.pairs), columns)
        rows = pc.index_in(scores["pair_id"], table["pair_id"].combine_chunks())
        if rows.null_count:
            raise RuntimeError(f"{run.scores}: not the scores of the pairs in {run.pairs}")
        table = table.take(rows)
        weights = config.method.weights(_column(scores, "mi_chosen"), _column(scores, "mi_rejected"))
        shape = model_config(config.model)
        plain = prefix_sharing_obstacle(shape, config.data.max_length)
        width, responses = shape.get_text_config().hidden_size, len(config.method.responses)
        layout = PairLayout(width, plain is None, responses)
        return cls(config, load_tokenizer(config.model), table, scores, *weights, layout)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair with padding, in the layout of rows that the model takes."""
        parts = (self.scores[f"{part}_tokens"].to_pylist() for part in self._forwarded)
        return [self.layout.tokens(*pair) for pair in zip(*parts, strict=True)]

    def tokens(self, indices: Sequence[int]) -> int:
        """Real tokens that are forwarded of some pairs, the prompt counted once."""
        rows = self.scores.take(indices)
        return sum(sum(rows[f"{part}_tokens"].to_pylist()) for part in self._forwarded)

    @property
    def _forwarded(self) -> tuple[str, ...]:
        return "prompt", *self.config.method.responses

    def names(self, indices: Sequence[int]) -> str:
        """Ids of some pairs, for a message."""
        return "pairs " + ", ".join(self.table["pair_id"].take(indices).to_pylist())

    def split(self) -> tuple[TrainingPairs, TrainingPairs | None]:
        """(pairs to train on, held-out pairs or None)."""
        ids: list[str] = self.table["pair_id"].to_pylist()
        out = draw_held_out(ids, self.config.train.eval_fraction, self.config.seed)
        return (self._take(sorted(set(range(len(ids))) - set(out))), self._take(out)) if out else (self, None)

    def _take(self, rows: list[int]) -> TrainingPairs:
        return replace(
            self,
            table=self.table.take(rows),
            scores=self.scores.take(rows),
            weight_chosen=self.weight_chosen[rows],
            weight_rejected=self.weight_rejected[rows],
        )

    def logps(self, model: Any, indices: Sequence[int]) -> PairLogps:
        """Forward the policy over some pairs; returns its log-probs together with those of the reference."""
        pairs = self.table.take(indices)
        responses = self.config.method.responses
        policy_chosen, policy_rejected = pair_logps(model, encoded_pairs(pairs), responses)
        scores, device = self.scores.take(indices), policy_chosen.device
        unsafe = {
            side: torch.tensor([safe is False for safe in pairs[f"{side}_safe"].to_pylist()])
            for side in ("chosen", "rejected")
        }
        return PairLogps(
            policy_chosen,
            policy_rejected,
            *(
                values.to(device)
                for values in (
                    _column(scores, "ref_chosen_logps"),
                    _column(scores, "ref_rejected_logps"),
                    _column(scores, "chosen_tokens"),
                    _column(scores, "rejected_tokens"),
                    self.weight_chosen[indices],
                    self.weight_rejected[indices],
                    unsafe["chosen"],
                    unsafe["rejected"],
                )
            ),
        )


def _column(table: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(table[name].to_numpy().copy()).float()
