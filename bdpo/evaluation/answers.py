"""The two halves of an evaluation, shard by shard: generate answers, judge them.

Answers are text that a model generated: they lie under `<run_dir>/private/` and nowhere else. Verdicts
are ids and numbers. Each half commits shards of its own, so an item that was answered is never answered
again; a batch of verdicts is made again only if the judge failed at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import pyarrow as pa

from bdpo.config import Config, ModelConfig
from bdpo.evaluation.benchmarks.items import Item
from bdpo.evaluation.benchmarks.registry import load_items
from bdpo.evaluation.engines.base import Generate
from bdpo.evaluation.judges.base import Judge, Verdict
from bdpo.evaluation.judges.registry import judge_fingerprint, make_judge
from bdpo.evaluation.measures import VERDICT_SCHEMA
from bdpo.evaluation.responses import Questionnaire, Response, verdict_row, verdicts_on
from bdpo.models.adapters import adapter_digest, adapter_folder, load_adapted
from bdpo.models.loading import load_model, model_config, model_folder, weights_digest
from bdpo.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import Shard, ShardActor, ShardStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bdpo.evaluation.capability import Accuracies, NotRun


RESPONSE_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("response", pa.string()),
        ("new_tokens", pa.int64()),
        ("cut", pa.bool_()),
        ("finite", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of a run: one in a folder or on the hub, with or without an adapter over it."""

    model: ModelConfig
    adapter: str | None = None

    def load(self) -> PreTrainedModel:
        """The model on the CPU, in its dtype, an adapter merged into it."""
        if self.adapter is None:
            return load_model(model_folder(self.model), self.model)
        return load_adapted(self.model, adapter_folder(self.adapter, "evaluate.adapter"))

    def fingerprint(self) -> Fingerprint:
        """Digests of all that makes its answers."""
        fingerprint: Fingerprint = {
            "weights": weights_digest(model_folder(self.model)),
            **tokenizer_fingerprint(self.model),
            "dtype": self.model.dtype,
        }
        if self.adapter is not None:
            fingerprint["adapter"] = adapter_digest(adapter_folder(self.adapter, "evaluate.adapter"))
        return fingerprint


def trained_model(config: Config, run: RunDir) -> EvaluatedModel:
    """The model that is trained in a run folder, with the tokenizer and the chat template beside it."""
    changes = {"name_or_path": str(run.model), "revision": None, "chat_template": None}
    return EvaluatedModel(config.model.model_copy(update=changes))


def planned_items(config: Config) -> list[Item]:
    """All items, the longest prompts first: rows of a shard are of one length, and the dearest come first.

    Length in characters, so that planning needs no tokenizer; shards are then runs of this order.
    """
    return sorted(load_items(config.evaluate), key=lambda item: (-len(item.prompt or ""), item.item_id))


def answers_fingerprint(config: Config, model: EvaluatedModel) -> Fingerprint:
    """Everything that the answers of a model depend on, field by field."""
    return {**model.fingerprint(), **prompts_fingerprint(config)}


def prompts_fingerprint(config: Config) -> Fingerprint:
    """The part of it that is not the model."""
    evaluate = config.evaluate
    fingerprint: Fingerprint = {
        "prompts": items_digest(planned_items(config)),
        "evaluate.max_new_tokens": evaluate.max_new_tokens,
    }
    if evaluate.temperature:
        fingerprint |= {"evaluate.temperature": evaluate.temperature, "seed": config.seed}
    if evaluate.engine != "transformers":
        fingerprint["evaluate.engine"] = evaluate.engine
    return fingerprint


def items_digest(items: Sequence[Item]) -> str:
    """Changes with anything that is asked or judged.

    Topics decide only which items there are, targets are what attacks aim at, and the number of a sample is
    in its id.
    """
    left_out = ("target", "topic", "sample")
    return json_digest([{k: v for k, v in asdict(item).items() if k not in left_out} for item in items])


def answer_store(run: RunDir, name: str, fingerprint: Fingerprint) -> ShardStore:
    """The answers of the evaluated model called `name`: private files."""
    return ShardStore(run.responses(name), RESPONSE_SCHEMA, fingerprint, mode=0o600)


def verdict_store(config: Config, run: RunDir, name: str, fingerprint: Fingerprint) -> ShardStore:
    """The verdicts on those answers."""
    judged = {**fingerprint, **judge_fingerprint(config)}
    return ShardStore(run.eval(name) / "shards", VERDICT_SCHEMA, judged)


REPLY_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("replies", pa.list_(pa.string())),
        ("scores", pa.map_(pa.string(), pa.string())),
    ]
)
"""What a judge that writes wrote about an item, one entry each time it was asked, and the values that its
verdict was made of: by them verdicts can be audited, and other thresholds applied."""


def reply_store(run: RunDir, name: str, fingerprint: Fingerprint) -> ShardStore:
    """The replies of the judge: private files. Judges that write nothing leave it empty."""
    return ShardStore(run.replies(name), REPLY_SCHEMA, fingerprint, mode=0o600)


def forget_failures(scores: ShardStore) -> None:
    """Remove the shards in which a judge failed, so that they are judged again, perhaps with another key."""
    for first, rows in scores.finished().items():
        if scores.read_shard(first)["failure"].null_count < rows:
            scores.remove(first)


class ShardAnswerer(ShardActor):
    """An actor that generates: the model under evaluation, a range of prompts at a time."""

    def __init__(self, config: Config, model: EvaluatedModel, store: ShardStore, device: str) -> None:
        self.config = config
        self.model = model
        self.store = store
        self.device = device
        self.chat = load_tokenizer(model.model)
        self.items = planned_items(config)
        self.questionnaire = Questionnaire(config.evaluate, config.seed, self.chat, model_config(model.model))
        self.rows, self.tokens = 0, 0  # of the shard, and of each of its answers so far

    @cached_property
    def generate(self) -> Generate:
        """The engine; made on first use, so that a fault in making it is the task's, not a dead actor's."""
        from bdpo.evaluation.engines.hf import begun_ids, generate
        from bdpo.evaluation.engines.vllm import VLLMEngine
        from bdpo.models.layers import before_each_layer

        evaluate = self.config.evaluate
        if evaluate.engine == "transformers":
            model = self.model.load().to(self.device)  # type: ignore[arg-type]
            model.register_forward_pre_hook(lambda *_: self._next_token())
            before_each_layer(model, self._report)
            return partial(generate, model, self.chat)
        _, prompts, prefills = self.questionnaire.conversations(self.items)
        prompt_ids = begun_ids(self.chat, prompts, prefills)
        gpus = evaluate.gpus_per_worker
        return VLLMEngine(self.model.model, self.chat, prompt_ids, evaluate.max_new_tokens, gpus)

    def __call__(self, shard: Shard) -> Shard:
        """The same shard, once the answers to those items lie in the private folder."""
        items = self.items[shard["first"] : shard["first"] + shard["rows"]]
        self.rows, self.tokens = len(items), 0
        rows = [asdict(response) for response in self.questionnaire.responses(self.generate, items)]
        self.store.write(int(shard["first"]), pa.Table.from_pylist(rows, schema=RESPONSE_SCHEMA))
        return shard

    def _next_token(self) -> None:
        self.tokens += 1

    def _report(self) -> None:
        """Answers that end before `max_new_tokens` count as done when all of the shard are."""
        self.progress(self.rows * min(1.0, self.tokens / self.config.evaluate.max_new_tokens))


def measure_capability(
    config: Config,
    model: EvaluatedModel,
    benchmark: str,
    device: str,
    begins: Callable[[str, str], None] = lambda kind, what: None,
) -> Accuracies | NotRun:
    """The result of one capability benchmark, see `run_capability`: a task that loads the model itself.

    `begins(kind, what)` is called for the start, with the reading of the data, and for every forward.
    """
    from bdpo.evaluation.capability import run_capability

    begins("start", f"the start of {benchmark}")
    loaded = model.load().to(device)  # type: ignore[arg-type]
    loaded.register_forward_pre_hook(lambda *_: begins("forward", f"a forward of {benchmark}"))
    evaluate = config.evaluate
    tokenizer = load_tokenizer(model.model).tokenizer
    file = getattr(evaluate.capability_files, benchmark, None)
    return run_capability(benchmark, loaded, tokenizer, evaluate.limit, evaluate.batch_size, file)


class ShardJudge(ShardActor):
    """An actor that judges: reads a range of answers, commits their verdicts."""

    def __init__(
        self, config: Config, answers: ShardStore, scores: ShardStore, replies: ShardStore, device: str
    ) -> None:
        self.config = config
        self.replies = replies
        self.items = planned_items(config)
        self.answers = {row["item_id"]: Response(**row) for row in answers.read().to_pylist()}
        self.scores = scores

    @cached_property
    def judge(self) -> Judge:
        """Made on first use, so that a fault in making it is the task's and not a dead actor's."""
        return make_judge(self.config)

    def __call__(self, shard: Shard) -> Shard:
        """The same shard, once the verdicts on those items lie in the run folder."""
        items = self.items[shard["first"] : shard["first"] + shard["rows"]]
        answers = [self.answers[item.item_id] for item in items]
        verdicts = verdicts_on(self.judge, items, answers, self.progress)
        first, judged = int(shard["first"]), list(zip(items, verdicts, strict=True))
        self._keep_replies(first, judged)  # before the verdicts: what is judged can be audited
        rows = list(map(verdict_row, items, answers, verdicts))
        self.scores.write(first, pa.Table.from_pylist(rows, schema=VERDICT_SCHEMA))
        return shard

    def _keep_replies(self, first: int, judged: Sequence[tuple[Item, Verdict]]) -> None:
        rows = [
            {
                "item_id": item.item_id,
                "replies": list(map(_storable, verdict.replies)),
                "scores": [(_storable(name), _storable(value)) for name, value in verdict.scores],
            }
            for item, verdict in judged
            if verdict.replies
        ]
        self.replies.remove(first)
        if rows:
            self.replies.write(first, pa.Table.from_pylist(rows, schema=REPLY_SCHEMA))


def _storable(text: str) -> str:
    """The text without lone surrogates, which no column can hold."""
    return text.encode(errors="replace").decode()
