"""One record a request: the stores, the actors that fill them, and the fingerprint of both."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa

from bdpo.config import Config
from bdpo.evaluation.answers import EvaluatedModel
from bdpo.evaluation.attacks.base import Attack, Workplace
from bdpo.evaluation.attacks.records import MAX_UNJUDGED, RECORD_SCHEMA
from bdpo.evaluation.attacks.registry import attack_kind
from bdpo.evaluation.attacks.requests import load_requests
from bdpo.evaluation.judges.registry import judge_fingerprint
from bdpo.storage.digests import json_digest
from bdpo.storage.manifests import Fingerprint
from bdpo.storage.paths import StoragePath
from bdpo.storage.run_dir import RunDir
from bdpo.storage.shards import Shard, ShardActor, ShardStore

if TYPE_CHECKING:
    from bdpo.evaluation.attacks.attacked import AttackedModel


def attack_fingerprint(config: Config, model: EvaluatedModel) -> Fingerprint:
    """Everything that the records of an attack depend on, field by field."""
    section = config.attack.fingerprint()
    own = {f"attack.{key}": value for key, value in section.items() if key not in ("models", "limit")}
    return {
        **model.fingerprint(),
        **own,
        "requests": json_digest([asdict(request) for request in load_requests(config)]),
        "evaluate.max_new_tokens": config.evaluate.max_new_tokens,
        "seed": config.seed,
        "records": json_digest([*RECORD_SCHEMA.names, MAX_UNJUDGED]),
        **judge_fingerprint(config),
    }


def record_store(run: RunDir, kind: str, name: str, fingerprint: Fingerprint) -> ShardStore:
    """The records of an attack on the model called `name`: private files, a request each."""
    return ShardStore(run.attack_texts(kind, name) / "records", RECORD_SCHEMA, fingerprint, mode=0o600)


PREPARED_SCHEMA = pa.schema([("prepared", pa.bool_())])
"""What marks that an attack has made what it makes once for all requests."""


def prepared_store(run: RunDir, kind: str, name: str, fingerprint: Fingerprint) -> ShardStore:
    """One row once that is made."""
    return ShardStore(run.attack_texts(kind, name) / "prepared", PREPARED_SCHEMA, fingerprint, mode=0o600)


def state_folder(run: RunDir, kind: str, name: str) -> StoragePath:
    """The folder in which attacks that take long keep their state."""
    return run.attack_texts(kind, name) / "state"


class _Worker(ShardActor):
    """An actor with the model under attack; loaded on first use, so that a fault is the task's own."""

    def __init__(
        self, config: Config, model: EvaluatedModel, store: ShardStore, state: StoragePath, device: str
    ) -> None:
        self.config, self.model, self.store, self.state = config, model, store, state
        self.device = device
        self.requests = load_requests(config)

    @cached_property
    def workplace(self) -> Workplace:
        """The model and the judge, loaded."""
        from bdpo.evaluation.attacks.attacked import AttackedModel
        from bdpo.models.layers import before_each_layer

        attacked: AttackedModel = AttackedModel.load(self.config, self.model, self.device)
        before_each_layer(attacked.logps, lambda: self.progress(0.0))
        return Workplace(self.config, attacked, self.state, json_digest(self.store.fingerprint))


class Preparer(_Worker):
    """Makes what an attack makes once for all requests, as a universal suffix."""

    def __call__(self, shard: Shard) -> Shard:
        """The same shard, once that lies in the state folder."""
        attack_kind(self.config).prepare(self.workplace, self.requests)
        self.store.write(0, pa.table({"prepared": [True]}, schema=PREPARED_SCHEMA))
        return shard


class RequestAttacker(_Worker):
    """Attacks the model with a range of requests, and commits their records."""

    @cached_property
    def attack(self) -> Attack:
        """The configured attack."""
        return attack_kind(self.config).make(self.workplace)

    def __call__(self, shard: Shard) -> Shard:
        """The same shard, once the records of those requests lie in the private folder."""
        first = int(shard["first"])
        rows = [asdict(self.attack(request)) for request in self.requests[first : first + shard["rows"]]]
        self.store.write(first, pa.Table.from_pylist(rows, schema=RECORD_SCHEMA))
        return shard
