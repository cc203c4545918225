"""What a training depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdpo.config import parse_config
from bdpo.models.tokenizer import ChatTokenizer
from pipelines.train import train_fingerprint
from tests.support.helpers import invented_pairs, save_model, tiny_config, write_jsonl
from tests.support.scored_run import prepared_run


@pytest.mark.parametrize(("method", "requires_scores"), [("bdpo", True), ("sft", False)])
def test_a_key_of_the_scores_counts_where_scores_are_read(
    tmp_path: Path, tiny_chat: ChatTokenizer, method: str, requires_scores: bool
) -> None:
    model, data = save_model(tmp_path / "model", tiny_chat), tmp_path / "pairs.jsonl"
    config = tiny_config(
        tmp_path / "run", model, write_jsonl(data, invented_pairs(4)), method={"name": method}
    )
    run = prepared_run(config)
    changed = parse_config(config.model_dump() | {"score": {"unconditional": "bos"}}, "test")
    assert changed.score.unconditional != config.score.unconditional
    differ = train_fingerprint(changed, run) != train_fingerprint(config, run)
    assert differ == requires_scores
