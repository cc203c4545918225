"""How likely the base model finds an answer: by that answers are broken which no rule on their text finds.

A model that babbles in frequent words passes every rule of `bdpo.evaluation.texts`, but not a language model.
The log-probs of an answer under the base model of the run are averaged over its tokens; how the threshold was
found stands in docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa

from bdpo.config import Config
from bdpo.evaluation.answers import EvaluatedModel, planned_items
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.responses import Response, prefill_ids
from bdpo.evaluation.thoughts import without_thoughts
from bdpo.models.loading import has_positions, model_folder, positions_of, weights_digest
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer, load_tokenizer
from bdpo.storage.manifests import Fingerprint
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import Shard, ShardActor, ShardStore

if TYPE_CHECKING:
    from bdpo.models.logps import LogpsModel

UNLIKELY = -4.0
"""Mean log-prob of a token, nats, below which an answer counts as broken. Fluent answers of other models are
at -1 to -3 under a model of 135 M parameters, and nearer to 0 under larger ones."""

FEWEST_TOKENS = 10
"""Of a shorter answer a few unexpected words decide the mean: it is not measured."""

FORWARDED = 8
"""Answers that are forwarded together."""

LOGP_SCHEMA = pa.schema([("item_id", pa.string()), ("reference_logp", pa.float64())])


def reference_fingerprint(config: Config) -> Fingerprint:
    """What decides about these log-probs besides the answers; empty where they are not computed."""
    if not config.evaluate.reference_logps:
        return {}
    return {"evaluate.reference_logps": UNLIKELY, "reference": weights_digest(model_folder(config.model))}


def logp_store(config: Config, run: RunDir, name: str, fingerprint: Fingerprint) -> ShardStore:
    """The mean log-probs of the answers of the model called `name`, numbers alone."""
    own = {**fingerprint, **reference_fingerprint(config)}
    return ShardStore(run.eval(name) / "reference", LOGP_SCHEMA, own)


class ShardReference(ShardActor):
    """An actor that holds the base model, and forwards a range of answers."""

    def __init__(self, config: Config, answers: ShardStore, logps: ShardStore, device: str) -> None:
        self.config = config
        self.device = device
        self.items = planned_items(config)
        self.answers = {row["item_id"]: Response(**row) for row in answers.read().to_pylist()}
        self.logps = logps
        self.chat = load_tokenizer(config.model)

    @cached_property
    def model(self) -> LogpsModel:
        """The base model; made on first use, so that a fault in making it is the task's."""
        from bdpo.models.logps import LogpsModel

        loaded = EvaluatedModel(self.config.model).load()
        positions = positions_of(loaded.config) or self.config.data.max_length
        return LogpsModel(loaded, positions).to(self.device).eval()

    def __call__(self, shard: Shard) -> Shard:
        """The same shard, once the log-probs of those answers lie in the run folder."""
        items = self.items[shard["first"] : shard["first"] + shard["rows"]]
        logps: list[float | None] = []
        for first in range(0, len(items), FORWARDED):
            part = items[first : first + FORWARDED]
            limit = self.config.evaluate.max_new_tokens
            groups = [_group(self.chat, item, self.answers[item.item_id], limit) for item in part]
            logps += mean_logps(self.model, groups)
            self.progress(len(logps))
        rows = [
            {"item_id": item.item_id, "reference_logp": logp} for item, logp in zip(items, logps, strict=True)
        ]
        self.logps.write(int(shard["first"]), pa.Table.from_pylist(rows, schema=LOGP_SCHEMA))
        return shard


def _group(chat: ChatTokenizer, item: Item, answer: Response, limit: int) -> tuple[list[int], list[int]]:
    """Prompt and answer as ids, the answer without its thoughts and without an end of turn."""
    text = without_thoughts(answer.response) if answer.response and answer.finite else None
    prompt = chat.prompt_ids([Message(role="user", content=item.prompt or "")])
    return prompt + prefill_ids(chat, item), chat.text_ids(text, continues=True)[:limit] if text else []


def mean_logps(model: LogpsModel, groups: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    """Mean log-prob of a token of each answer behind its prompt, nats.

    None for answers of fewer than `FEWEST_TOKENS` tokens, of more than the model has positions for, and where
    the model gives no number.
    """
    import torch

    from bdpo.models.packing import PrefixGroups

    config = model.model.config
    long_enough = [
        n
        for n, (prompt, answer) in enumerate(groups)
        if len(answer) >= FEWEST_TOKENS and has_positions(config, len(prompt) + len(answer))
    ]
    found: list[float | None] = [None] * len(groups)
    if long_enough:
        with torch.inference_mode():
            sums = model(model.layout.pack(PrefixGroups.of([groups[n] for n in long_enough]))).tolist()
        for n, logp in zip(long_enough, sums, strict=True):
            found[n] = logp / len(groups[n][1]) if math.isfinite(logp) else None
    return found


def with_logps(scores: pa.Table, logps: pa.Table) -> pa.Table:
    """Scores with the column `reference_logp`; answers below `UNLIKELY` are broken, if they were not yet."""
    of = dict(zip(*(logps[name].to_pylist() for name in LOGP_SCHEMA.names), strict=True))
    column = [of[item] for item in scores["item_id"].to_pylist()]
    broken = [
        known or ("unlikely" if logp is not None and logp < UNLIKELY else None)
        for known, logp in zip(scores["broken"].to_pylist(), column, strict=True)
    ]
    index = scores.schema.get_field_index("broken")
    marked = scores.set_column(index, scores.schema.field(index), pa.array(broken, pa.string()))
    return marked.append_column(LOGP_SCHEMA.field("reference_logp"), pa.array(column, pa.float64()))
