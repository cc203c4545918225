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
def keep(trained, exported, data, probes):
    torch.save((trained, probes), run.root / "engine.pt")
    exporting.original(trained, exported, data, probes)
exporting._require_same = keep
def info(message, distance, seconds):
    (run.root / "distance").write_text(str(distance))
exporting.log.info = info
"""

# Exports another model than the one that was trained, by `change`.
WRONG = """
from bdpo.training import engine as engines, export as exporting
vars(exporting.log).pop("info", None)  # of the run before, in this same process
exporting._require_same = exporting.original
right, right_export, train = engines.trained_weights, exporting.export, training.train
{change}
def caught(*arguments):
    try:
        train(*arguments)
    except RuntimeError as error:
        (run.root / f"error-{{rank}}.txt").write_text(str(error))
    finally:
        engines.trained_weights, exporting.export, training.train = right, right_export, train
training.train = caught
"""

SCALED = """
def other(engine):
    weights = right(engine)
    return weights and {name: w * 1.5 if "{part}" in name else w for name, w in weights.items()}
engines.trained_weights = other
"""

UNTRAINED = """
from safetensors.torch import load_file
base = load_file(Path(load_config(str(run.config)).model.name_or_path) / "model.safetensors")
def other(engine):
    weights = right(engine)
    return weights and {name: base[name.removeprefix("model.")].to(w.dtype) for name, w in weights.items()}
engines.trained_weights = other
"""

USED_OTHERWISE = """
def other(engine, chat, folder):
    right_export(engine, chat, folder)
    if rank == 0:
        file = folder / "config.json"
        shape = json.loads(file.read_text())
        file.write_text(json.dumps(shape | {"rms_norm_eps": 0.5}))
exporting.export = other
"""

SMALL = {"learning_rate": 1e-6, "max_steps": 3}

WRONGS = {
    "other weights": ("float32", {}, SCALED.replace("{part}", "q_proj"), r"4 tensors have other values \("),
    "other adapter": ("float32", {"lora": LORA}, SCALED.replace("{part}", "lora_B"), "4 tensors have other"),
    "untrained, stage 1": ("bfloat16", SMALL | {"zero_stage": 1}, UNTRAINED, "tensors have other values"),
    "untrained, stage 3": ("bfloat16", SMALL | {"zero_stage": 3}, UNTRAINED, "tensors have other values"),
    "another config": (
        "float32",
        {},
        USED_OTHERWISE,
        r"log-probs of pairs .* more than the 0\.001 that float32",
    ),
}


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
    for name, (dtype, train, change, _) in WRONGS.items():
        run = folder_of(folder, name)
        configs[name] = copied(scored[dtype], run, train={"max_steps": 1} | train)
        (run / "fault.py").write_text(WRONG.format(change=change))
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


@pytest.mark.parametrize("name", WRONGS)
def test_another_model_than_the_trained_one_is_never_exported(distances, name):
    """Also one that computes the same to rounding, as an untrained one does where little was trained."""
    run = folder_of(distances, name)
    (error,) = errors(run)
    assert re.match(f"the exported model is not the trained one: .*{WRONGS[name][3]}", error)
    assert not (run / "model").exists()
    assert not (run / "adapter").exists()
