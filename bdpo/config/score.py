"""Section `score`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bdpo.config.base import Workers
from bdpo.section import Positive, Section


class ScoreConfig(Section):
    """Mutual-information scoring with the reference model."""

    unconditional: Literal["empty_turn", "bos"] = "empty_turn"
    tokens_per_batch: Positive = Field(16384, description="padded tokens of one forward pass")
    shard_rows: Positive = Field(512, description="pairs in one shard, the unit that is never half done")
    workers: Workers = 1
    gpus_per_worker: float = Field(1.0, ge=0)
