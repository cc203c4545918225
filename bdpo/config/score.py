"""Section `score`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bdpo.config.base import StallSeconds, Workers
from bdpo.section import RUNTIME_ONLY, Positive, Section


class ScoreConfig(Section):
    """Mutual-information scoring with the reference model."""

    unconditional: Literal["empty_turn", "bos"] = Field(
        "empty_turn", description="context c(∅): the chat template with an empty user turn, or BOS alone"
    )
    tokens_per_batch: Annotated[Positive, RUNTIME_ONLY] = Field(
        16384, description="padded tokens of one forward pass"
    )
    shard_rows: Annotated[Positive, RUNTIME_ONLY] = Field(
        512, description="pairs in one shard, the unit that is never half done"
    )
    workers: Annotated[Workers, RUNTIME_ONLY] = Field(
        1, description="processes; `[min, max]` follows the cluster"
    )
    gpus_per_worker: Annotated[float, RUNTIME_ONLY] = Field(
        1.0, ge=0, description="GPUs of one process, also a share of one"
    )
    stall_seconds: StallSeconds = 60.0
