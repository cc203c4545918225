"""What is exported is what was trained: every ZeRO stage and dtype, LoRA; a wrong export is noticed."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from bdpo.config import LoraConfig, load_config
from bdpo.models.adapters import add_lora, load_adapted
from bdpo.models.loading import load_model
from bdpo.models.logps import ROUNDING, LogpsModel
from bdpo.storage.checksums import CHECKSUMS
from bdpo.storage.run_dir import RunDir
from bdpo.training.export import _probe
from bdpo.training.pairs import TrainingPairs
from tests.support.training import copied, errors, launch, score

pytestmark = pytest.mark.long

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}

VARIANTS = {
    f"{name}, stage {stage}, {dtype}": (dtype, {"zero_stage": stage, "lora": lora})
    for name, lora in {"full": None, "lora": LORA}.items()
    for dtype in ROUNDING
    for stage in (0, 1, 2, 3)
    if stage or dtype == "float32"  # which stage 0 requires
}
VARIANTS["lora on untied embeddings"] = ("float32", {"lora": {"target_modules": ["embed_tokens"]}})

# Keeps how far the exported model was from the engine, and what the engine computed.
WATCH = """
from bdpo.training import export as exporting
exporting.original = getattr(exporting, "original", exporting._require_same)
def keep(trained, folder, data, probes):
    torch.save((trained, probes), run.root / "engine.pt")
    exporting.original(trained, folder, data, probes)
exporting._require_same = keep
def info(message, distance, seconds):
    (run.root / "distance").write_text(str(distance))
exporting.log.info = info
"""

# Exports other weights than those that were trained.
WRONG = """
from bdpo.training import export as exporting
vars(exporting.log).pop("info", None)  # of the run before, in this same process
exporting._require_same = exporting.original
from bdpo.training import engine as engines
right = engines.trained_weights
def other(engine):
    weights = right(engine)
    return weights and {name: w * 1.5 if "q_proj" in name else w for name, w in weights.items()}
engines.trained_weights = other
train = training.train
def caught(*arguments):
    try:
        train(*arguments)
    except RuntimeError as error:
        (run.root / f"error-{rank}.txt").write_text(str(error))
    finally:
        engines.trained_weights, training.train = right, train
training.train = caught
"""


def folder_of(folder, name):
    return folder / re.sub(r"\W+", "-", name)


@pytest.fixture(scope="module")
def distances(tmp_path_factory, tiny_chat):
    folder, configs = tmp_path_factory.mktemp("export"), {}
    scored = {dtype: score(tmp_path_factory.mktemp(dtype), tiny_chat, dtype=dtype) for dtype in ROUNDING}
    for name, (dtype, train) in VARIANTS.items():
        run = folder_of(folder, name)
        configs[name] = copied(scored[dtype], run, train=train | {"max_steps": 2})
        (run / "fault.py").write_text(WATCH)
    configs["wrong"] = copied(scored["float32"], folder / "wrong", train={"max_steps": 1})
    (folder / "wrong" / "fault.py").write_text(WRONG)
    launch(list(configs.values()), workers=2, may_stop=True)
    return folder


@pytest.mark.usefixtures("alone")
def test_a_probe_is_without_dropout_per_root_token_and_leaves_the_mode(tmp_path, tiny_chat):
    config = score(tmp_path, tiny_chat)
    data = TrainingPairs.load(
        config, RunDir(config.run_dir), pq.read_table(f"{config.run_dir}/scores.parquet")
    )
    model = load_model(Path(config.model.name_or_path), config.model)
    add_lora(model, LoraConfig(dropout=0.5, target_modules=["q_proj"]), config.model, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy = LogpsModel(model, config.data.max_length)
    with torch.no_grad():
        logps = data.packed([3, 5]).logps(policy.eval())
    expected = [
        logps.policy_chosen / logps.chosen_tokens**0.5,
        logps.policy_rejected / logps.rejected_tokens**0.5,
    ]
    found = _probe(policy.train(), data, [3, 5])
    torch.testing.assert_close(found, torch.cat(expected).double())
    assert policy.training
    _probe(policy.eval(), data, [3])
    assert not policy.training


@pytest.mark.parametrize("name", VARIANTS)
def test_the_exported_model_is_within_rounding_of_the_engine(distances, name):
    run = folder_of(distances, name)
    assert not errors(run)
    distance = float((run / "distance").read_text())
    print(f"{name}: {distance:.2g} nats per root token")
    assert distance <= ROUNDING[VARIANTS[name][0]]
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "model" / CHECKSUMS).is_file()
    assert (run / "adapter" / CHECKSUMS).is_file() == ("lora" in name)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "lora" in name])
def test_the_adapter_over_its_base_is_within_rounding_of_the_engine(distances, name):
    folder = folder_of(distances, name)
    config, run = load_config(str(folder / "config.yaml")), RunDir(str(folder))
    trained, probes = torch.load(folder / "engine.pt")
    data = TrainingPairs.load(config, run, pq.read_table(folder / "scores.parquet"))
    adapted = LogpsModel(load_adapted(config.model, run.adapter).eval(), config.data.max_length)
    distance = float((_probe(adapted, data, probes) - trained).abs().max())
    print(f"{name}, adapter over its base: {distance:.2g} nats per root token")
    assert distance <= ROUNDING[config.model.dtype]


def test_another_model_than_the_trained_one_is_never_exported(distances):
    run = distances / "wrong"
    assert any("the exported model is not the trained one" in error for error in errors(run))
    assert not (run / "model").exists()
