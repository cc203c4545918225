"""LoRA adapters over a tiny model; needs peft, from the extra `lora`."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from bdpo.config import LoraConfig, ModelConfig
from bdpo.errors import UserError
from bdpo.evaluation.judges.finetuned import load_finetuned_judge
from bdpo.models import adapters
from bdpo.models.adapters import (
    adapter_digest,
    adapter_folder,
    add_lora,
    base_of,
    load_adapted,
    require_complete_adapter,
)
from bdpo.models.loading import load_model
from tests.support.architectures import tiny
from tests.support.chats import CHATML, MakeChat
from tests.support.helpers import save_model, tiny_qwen2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_chat: MakeChat) -> ModelConfig:
    folder = save_model(tmp_path_factory.mktemp("base"), make_chat(CHATML))
    return ModelConfig(name_or_path=str(folder), dtype="float32")


def lora(**changes: object) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(settings | changes))


def save_adapter(folder: Path, base: ModelConfig, config: peft.PeftConfig | None = None) -> Path:
    """An adapter, by default a LoRA, with random weights in both halves, so that it does something."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load_model(Path(base.name_or_path), base), config or lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_into_its_base(tmp_path: Path, base: ModelConfig) -> None:
    folder = adapter_folder(str(save_adapter(tmp_path / "a", base)), "evaluate.adapter")
    ids = torch.arange(6, 30)[None]
    plain = load_model(Path(base.name_or_path), base)
    merged = load_adapted(base, folder)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(plain, folder)(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.1
    assert type(merged) is type(load_model(Path(base.name_or_path), base))
    assert base_of(folder).name_or_path == base.name_or_path


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_the_base_of_an_adapter_has_the_revision_that_the_adapter_names(tmp_path: Path, revision) -> None:
    named = {"base_model_name_or_path": "owner/model", "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    assert base_of(tmp_path) == ModelConfig(name_or_path="owner/model", revision=revision)


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "owner/model", "revision": []}, "names no base_model_name_or_path"),
        (
            {"base_model_name_or_path": "{folder}", "revision": "v1"},
            "revision=v1: .* is a folder, which has no",
        ),
    ],
)
def test_an_adapter_whose_base_cannot_be_told_is_refused(tmp_path: Path, named, reason) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(named).replace("{folder}", str(tmp_path)))
    with pytest.raises(UserError, match=rf"^{file}: {reason}"):
        base_of(tmp_path)


def test_a_judge_may_be_an_adapter_that_names_its_base(
    tmp_path: Path, base: ModelConfig, make_chat: MakeChat
) -> None:
    folder = save_adapter(tmp_path / "a", base)
    make_chat(CHATML).tokenizer.save_pretrained(folder)
    judge = load_finetuned_judge(str(folder), on_gpu=False)
    ids = judge.prompt_ids("Tie", "Cross")[-64:]
    plain = load_finetuned_judge(base.name_or_path, on_gpu=False)
    assert judge.expectation(ids) != pytest.approx(plain.expectation(ids), abs=1e-3)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: ModelConfig) -> None:
    folder = save_adapter(tmp_path / "a", base)
    weights = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: torch.ones(3, 3) for name in load_file(weights)}, weights)
    with pytest.raises(UserError, match="does not fit"):
        load_adapted(base, folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: dict(list(weights.items())[1:]), "1 missing"),
        (lambda weights: {f"x.{name}": w for name, w in weights.items()}, "missing .*; .*unknown"),
        (lambda weights: {name: w * torch.nan for name, w in weights.items()}, "NaN or infinite weights in"),
    ],
    ids=["missing", "renamed", "not a number"],
)
def test_an_adapter_that_is_not_complete_and_finite_is_refused(tmp_path, base, change, reason) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_adapter(tmp_path / "a", base)
    weights = folder / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    with pytest.raises(UserError, match=reason):
        load_adapted(base, folder)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_not_adapted(module: str) -> None:
    """PEFT would adapt one of the two, and merge into both."""
    with pytest.raises(UserError, match="the embeddings are tied to the output head"):
        add_lora(tiny_qwen2(tied=True), LoraConfig(target_modules=[module]), ModelConfig(name_or_path="m"), 0)
    if module == "embed_tokens":
        add_lora(tiny_qwen2(), LoraConfig(target_modules=[module]), ModelConfig(name_or_path="m"), 0)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("tied")
    tiny_qwen2(tied=True).save_pretrained(folder)
    return ModelConfig(name_or_path=str(folder), dtype="float32")


ONE_OF_TIED = pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])


@ONE_OF_TIED
def test_an_adapter_of_one_of_tied_embeddings_is_merged_into_that_one(tmp_path, tied, module) -> None:
    """As PEFT computes with it, and as a model that is saved and loaded again."""
    folder = save_adapter(tmp_path / "a", tied, lora(target_modules=["q_proj", module]))
    require_complete_adapter(folder, tied)
    merged = load_adapted(tied, folder)
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged", ModelConfig(name_or_path="merged", dtype="float32"))
    plain, ids = load_model(Path(tied.name_or_path), tied), torch.arange(6, 30)[None]
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(plain, folder)(input_ids=ids).logits
        for found in (merged(input_ids=ids).logits, again(input_ids=ids).logits):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1


@ONE_OF_TIED
def test_an_adapter_that_would_be_merged_into_another_model_is_refused(
    tmp_path, tied, module, monkeypatch
) -> None:
    """Here into both of the tied embeddings."""
    folder = save_adapter(tmp_path / "a", tied, lora(target_modules=[module]))
    monkeypatch.setattr(adapters, "_untie", lambda adapted: None)
    with pytest.raises(UserError, match=r"merged into .* the adapter is another model: log-probs of 32 "):
        load_adapted(tied, folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING is not an ad"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING is not an ad"),
        (lora(lora_bias=True, target_modules=["down_proj"]), "the base layer has no bias"),
    ],
    ids=["prompt tuning", "prefix tuning", "bias of a layer without bias"],
)
def test_an_adapter_that_cannot_be_merged_is_refused_beforehand(tmp_path, base, config, reason) -> None:
    folder = save_adapter(tmp_path / "a", base, config)
    for refused in (require_complete_adapter, lambda folder, base: load_adapted(base, folder)):
        with pytest.raises(UserError, match=f"cannot be merged.*{reason}") as caught:
            refused(folder, base)
        assert "\n" not in str(caught.value)


def test_an_adapter_of_experts_is_complete_or_refused(tmp_path) -> None:
    """PEFT adapts the weights of experts by layers one within the other, called `base_layer`."""
    from safetensors.torch import load_file, save_file

    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    base = ModelConfig(name_or_path=str(tmp_path / "base"), dtype="float32")
    folder = save_adapter(tmp_path / "a", base, lora(target_modules=["gate_proj", "up_proj", "down_proj"]))
    require_complete_adapter(folder, base)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    lost = [name for name in weights if "layers.0" in name and ".base_layer." in name]
    assert lost
    save_file({name: weight for name, weight in weights.items() if name not in lost}, file)
    with pytest.raises(UserError, match=rf"{len(lost)} missing \({lost[0]}"):
        require_complete_adapter(folder, base)


def add_to(model, *target_modules):
    add_lora(model, LoraConfig(target_modules=list(target_modules)), ModelConfig(name_or_path="m"), 0)


@pytest.mark.parametrize(
    ("target", "hint"), [("k_prj", "; did you mean k_proj?"), ("layers.0.self_attn.k_prj", ""), ("xyz", "")]
)
def test_a_name_that_fits_no_module_is_refused_with_the_nearest(target, hint) -> None:
    with pytest.raises(UserError) as caught:
        add_to(tiny_qwen2(), "q_proj", target)
    assert str(caught.value) == (
        f"train.lora.target_modules=['q_proj', '{target}']: no module of the model is called {target}{hint}"
    )


def test_names_that_fit_are_of_modules_paths_or_experts() -> None:
    add_to(tiny_qwen2(), "q_proj", "layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")
    add_to(tiny("qwen3_moe"), "q_proj", "gate_proj", "up_proj")
    with pytest.raises(UserError, match="no module of the model is called proj"):
        add_to(tiny_qwen2(), "q_proj", "proj")  # the end of a name, but no name


def test_a_folder_without_safetensors_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"evaluate\.adapter=.*no adapter_model\.safetensors"):
        adapter_folder(str(tmp_path), "evaluate.adapter")


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    digests = []
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        digests.append(adapter_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]
