"""The pairs of a training, as its method forwards them."""

from __future__ import annotations

import pytest
import torch

from bdpo.data.pairs import all_pairs, pairs_digest
from bdpo.data.prepare import prepare
from bdpo.models.logps import LogpsModel
from bdpo.models.tokenizer import load_tokenizer
from bdpo.scoring.selection import training_rows
from bdpo.storage.manifests import write_manifest
from bdpo.storage.run_dir import RunDir
from bdpo.training.pairs import TrainingPairs
from tests.support.helpers import invented_pairs, save_model, tiny_config, tiny_qwen2, write_jsonl

PAIRS = 6


@pytest.mark.parametrize("shared", [True, False])
def test_a_response_that_the_method_leaves_out_is_not_forwarded(tmp_path, tiny_chat, shared):
    model = save_model(tmp_path / "model", tiny_chat)
    data = write_jsonl(tmp_path / "pairs.jsonl", invented_pairs(PAIRS))
    found, forwarded = {}, {}
    for name in ("sft", "cpo"):
        config = tiny_config(tmp_path / name, model, data, method={"name": name})
        if not shared:
            config = config.model_copy(
                update={"model": config.model.model_copy(update={"attn_implementation": "eager"})}
            )
        run = RunDir(config.run_dir)
        run.open(config)
        prepare(config.data, load_tokenizer(config.model), run.pairs, run.private, seed=0)
        write_manifest(run.data / "manifest.json", {}, pairs_digest=pairs_digest(run.pairs))
        pairs = TrainingPairs.load(config, run, training_rows(config, run))
        weights = tiny_qwen2()
        weights.set_attn_implementation("sdpa" if shared else "eager")
        policy = LogpsModel(weights, config.data.max_length)
        assert (pairs.layout.shared, policy.layout.shared) == (shared, shared)
        with torch.no_grad():
            found[name] = [pairs.packed([row]).logps(policy) for row in range(PAIRS)]
        assert policy.tokens_forwarded == sum(pairs.lengths)
        forwarded[name] = pairs.tokens(list(range(PAIRS)))
    tokens = all_pairs(run.pairs, ["rejected_ids"])["rejected_ids"].to_pylist()
    assert forwarded["cpo"] - forwarded["sft"] == sum(map(len, tokens))
    for one, both in zip(found["sft"], found["cpo"], strict=True):
        torch.testing.assert_close(one.policy_chosen, both.policy_chosen)
        assert one.policy_rejected.isnan().all()
        assert both.policy_rejected.isfinite().all()
