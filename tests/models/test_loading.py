"""What a model folder's content is called, and that it is read no more often than it must be."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, LlamaConfig

from bdpo.config import ModelConfig, parse_config
from bdpo.errors import UserError
from bdpo.evaluation.judges.finetuned import load_finetuned_judge
from bdpo.models import loading as models
from bdpo.models.loading import (
    load_model,
    model_config,
    model_folder,
    plain_attention,
    require_complete_weights,
    require_positions,
    weights_digest,
)
from bdpo.models.tokenizer_files import read_tokenizer
from bdpo.storage.cache import cache_folder
from tests.support.architectures import tiny
from tests.support.helpers import tiny_qwen2

SIZE = 4 * 2**20


def bytes_read():
    """By this process, of whatever file: the kernel's own count."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights that were written an hour ago."""
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write(folder / "model.safetensors", b"a")
    return folder


def write(file, byte, hours_ago=1):
    file.write_bytes(byte * SIZE)
    then = file.stat().st_mtime - 3600 * hours_ago
    os.utime(file, (then, then))


def digest_and_bytes(folder):
    before = bytes_read()
    return weights_digest(folder), bytes_read() - before


def test_weights_are_read_once_and_again_when_they_change(folder):
    file = folder / "model.safetensors"
    first, read = digest_and_bytes(folder)
    assert read >= SIZE
    again, read = digest_and_bytes(folder)
    assert again == first
    assert read < SIZE / 100
    kept = file.stat()
    with file.open("r+b") as stream:  # the same size, file and time: only its time of change tells
        stream.write(b"b")
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    changed, read = digest_and_bytes(folder)
    assert changed != first
    assert read >= SIZE


def test_code_that_a_model_brings_is_part_of_it(folder):
    without = weights_digest(folder)
    (folder / "modeling_own.py").write_text("scale = 1")
    first = weights_digest(folder)
    (folder / "modeling_own.py").write_text("scale = 2")
    assert len({without, first, weights_digest(folder)}) == 3


def test_what_is_kept_is_the_digest_of_the_content_wherever_it_lies(folder, tmp_path):
    first = weights_digest(folder)
    folder.rename(tmp_path / "elsewhere")
    assert weights_digest(tmp_path / "elsewhere") == first == weights_digest(tmp_path / "elsewhere")
    (kept, _) = sorted((cache_folder() / "digests").iterdir())
    assert kept.read_text().split()[1] == hashlib.sha256(b"a" * SIZE).hexdigest()


def test_weights_that_changed_just_now_are_not_kept(folder):
    """They could change again at what the clock of the file system calls the same time."""
    write(folder / "model.safetensors", b"b", hours_ago=0)
    weights_digest(folder)
    assert not (cache_folder() / "digests").exists()


def test_processes_that_begin_together_read_once(folder):
    read = bytes_read()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(weights_digest, [folder] * 4))) == 1
    assert bytes_read() - read < 1.5 * SIZE


def test_a_cache_that_cannot_be_used_is_done_without(folder, monkeypatch, tmp_path):
    first = weights_digest(folder)
    monkeypatch.setenv("BDPO_CACHE", str(folder / "config.json"))
    assert weights_digest(folder) == first
    monkeypatch.setenv("BDPO_CACHE", str(tmp_path / "cache"))
    for kept in (cache_folder() / "digests").iterdir():
        kept.write_text("half")
    assert weights_digest(folder) == first


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=DYNAMIC), 64),
        (
            LlamaConfig(
                max_position_embeddings=256,
                rope_parameters=DYNAMIC | {"original_max_position_embeddings": 64},
            ),
            64,
        ),
        (
            Gemma3TextConfig(
                max_position_embeddings=64,
                rope_parameters={"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            ),
            64,
        ),
    ],
)
def test_a_sequence_that_is_too_long_for_the_model_is_refused(monkeypatch, shape, positions):
    """Also one that would give the positions of all rows beside it another meaning."""
    monkeypatch.setattr(models, "model_config", lambda model: shape)

    def of_length(length):
        data = {"path": "p", "max_length": length, "max_prompt_length": 8}
        return parse_config({"run_dir": "r", "model": {"name_or_path": "m"}, "data": data}, "test")

    require_positions(of_length(positions))
    with pytest.raises(UserError, match=rf"data.max_length={positions + 1}: m has no more than {positions}"):
        require_positions(of_length(positions + 1))


def without_mlp(weights):
    return {name: weight for name, weight in weights.items() if ".mlp." not in name}


def renamed(weights):
    return {f"module.{name}": weight for name, weight in weights.items()}


def mis_shaped(weights):
    return weights | {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 5)}


def one_too_many(weights):
    return weights | {"model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)}


def not_a_number(weights):
    return weights | {"model.norm.weight": torch.full((32,), torch.nan)}


def tied_to_another(weights):
    """With a config that ties the two: see the fixture."""
    return weights | {"lm_head.weight": weights["lm_head.weight"] + 1}


def infinite(weights):
    weights["model.layers.1.self_attn.q_proj.weight"][3, 4] = -torch.inf
    return weights


def untouched(weights):
    return weights


DAMAGES = {
    without_mlp: r"6 missing \(model\.layers\.0\.mlp\.down_proj\.weight, .*, …\)",
    renamed: r"missing \(.*; .* unknown to the architecture \(module\.lm_head\.weight",
    mis_shaped: r"1 of another shape \(model\.layers\.0\.mlp\.up_proj\.weight\)",
    one_too_many: r"1 unknown to the architecture \(model\.layers\.7\.mlp\.up_proj\.weight\)",
    not_a_number: r"NaN or infinite weights in 1 tensors \(model\.norm\.weight\)",
    tied_to_another: (
        r"model\.safetensors: lm_head\.weight and model\.embed_tokens\.weight differ, while config\.json ties"
    ),
    infinite: r"NaN or infinite weights in 1 tensors \(model\.layers\.1\.self_attn\.q_proj\.weight\)",
}

every_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@pytest.fixture
def damaged(tmp_path):
    """damaged(change): a model whose weights are what `change` makes of them."""

    def make(change):
        made = tiny_qwen2()
        made.config.tie_word_embeddings = change is tied_to_another
        made.save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return ModelConfig(name_or_path=str(tmp_path / "model"), dtype="float32")

    return make


@every_damage
def test_weights_that_are_not_complete_and_finite_are_refused_by_name(damaged, damage):
    model = damaged(damage)
    with pytest.raises(UserError, match=DAMAGES[damage]) as caught:
        load_model(model_folder(model), model)
    assert "\n" not in str(caught.value)
    if damage not in (not_a_number, infinite):
        with pytest.raises(UserError, match=DAMAGES[damage]):
            require_complete_weights(model)


@every_damage
def test_a_judge_of_such_weights_is_refused(damaged, damage):
    name = damaged(damage).name_or_path
    with pytest.raises(UserError, match=DAMAGES[damage]):
        load_finetuned_judge(name, on_gpu=False)


EXPERTS = "model.layers.0.mlp.experts"


def without(name):
    return lambda weights: {one: weight for one, weight in weights.items() if one != name}


def called(old, new):
    return lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}


def cut(name):
    return lambda weights: weights | {name: weights[name][:-1].clone()}


# Of 12 experts, so that the order of numbers is not that of text.
DAMAGED_EXPERTS = {
    "one tensor missing": (
        without(f"{EXPERTS}.1.up_proj.weight"),
        rf"tensors 1 missing \({EXPERTS}\.1\.up_proj\.weight\)$",
    ),
    "last missing": (
        without(f"{EXPERTS}.11.down_proj.weight"),
        r"tensors 1 of another shape \(model\.layers\.0\.mlp\.experts\.down_proj\)$",
    ),
    "renamed": (
        called(f"{EXPERTS}.1.", f"{EXPERTS}.19."),
        rf"tensors 3 missing \({EXPERTS}\.1\.down.*\); 3 without a place of their own \({EXPERTS}\.19\.down",
    ),
    "one tensor renamed": (
        called(f"{EXPERTS}.1.down", f"{EXPERTS}.19.down"),
        rf"1 missing \({EXPERTS}\.1\.down.*\); 1 without a place of their own \({EXPERTS}\.19\.down",
    ),
    "not a number": (
        called(f"{EXPERTS}.1.up", f"{EXPERTS}.one.up"),
        rf"1 missing \({EXPERTS}\.1\.up.*\); 1 without a place of their own \({EXPERTS}\.one\.up",
    ),
    "another number of digits": (
        called(f"{EXPERTS}.1.up", f"{EXPERTS}.01.up"),
        rf"1 missing \({EXPERTS}\.1\.up.*\); 1 without a place of their own \({EXPERTS}\.01\.up",
    ),
    "of another shape": (
        cut(f"{EXPERTS}.1.up_proj.weight"),
        rf"tensors 1 of another shape than the others of their kind \({EXPERTS}\.1\.up_proj\.weight\)$",
    ),
    "all of a kind missing": (
        lambda weights: {one: weight for one, weight in weights.items() if ".up_proj." not in one},
        r"some of the tensors that it puts together are missing, or of another shape",
    ),
    "two for one place": (
        lambda weights: weights | {"norm.weight": weights["model.norm.weight"] + 1},
        r"tensors 1 without a place of their own \(norm\.weight\)$",
    ),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    shape = tiny("qwen3_moe").config
    shape.update({"num_experts": 12, "num_local_experts": 12})
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGED_EXPERTS)
def test_a_tensor_of_an_expert_is_loaded_where_its_name_says(experts, tmp_path, name):
    """transformers puts them together in their order, whatever their numbers are."""
    change, reason = DAMAGED_EXPERTS[name]
    weights = load_file(experts / "model.safetensors")
    file, model = tmp_path / "model.safetensors", ModelConfig(name_or_path=str(tmp_path), dtype="float32")
    (tmp_path / "config.json").write_bytes((experts / "config.json").read_bytes())
    save_file(weights, file, {"format": "pt"})
    require_complete_weights(model)
    save_file(change(weights), file, {"format": "pt"})
    with pytest.raises(UserError, match=reason):
        require_complete_weights(model)
    with pytest.raises(UserError, match=reason):
        load_model(tmp_path, model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_complete_model_is_loaded(tmp_path, tied):
    """Of tied weights a file has one name, or both."""
    tiny_qwen2(tied=tied).save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path), dtype="float32")
    file = tmp_path / "model.safetensors"
    for _ in range(2):
        require_complete_weights(model)
        loaded, expected = load_model(tmp_path, model).state_dict(), tiny_qwen2(tied=tied).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())
        save_file(expected | {"lm_head.weight": expected["lm_head.weight"].clone()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("written", "is_newer"),
    [
        ("99.1.0", True),
        ("5.99.0.dev0", True),
        ("5.20.0", False),
        ("4.1", False),
        (None, False),
        ("new", False),
    ],
)
def test_a_config_of_a_newer_transformers_is_noted_once(damaged, caplog, written, is_newer):
    model = damaged(untouched)
    file = Path(model.name_or_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_version": written}))
    for _ in range(2):
        require_complete_weights(model)
    note = f"config.json is of transformers {written}, installed is {transformers.__version__}: a newer qwen2"
    assert [note in record.message for record in caplog.records] == [True] * is_newer


def folder_of(tmp_path, config, *files):
    (tmp_path / "config.json").write_text(config)
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    if not files:
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    return str(tmp_path)


USELESS = {
    "unknown type": ('{"model_type": "nonesuch"}', (), "transformers .* knows no model of this type"),
    "no type": ("{}", (), "knows no model of this type"),
    "remote code": (
        '{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}',
        (),
        "the model brings its own code, which is not run; model.trust_remote_code=true",
    ),
    "damaged config": ("{", (), r"config\.json: cannot be read as JSON"),
    "config of another type": ("[1]", (), r"config\.json: holds no JSON object"),
    "null for a config": ("null", (), r"config\.json: holds no JSON object"),
    "a key twice": ('{"model_type": "llama", "model_type": "qwen2"}', (), "the key model_type stands twice"),
    "an end that is text": (
        '{"model_type": "qwen2", "eos_token_id": "</s>"}', (), r"config\.json: eos_token_id is neither",
    ),
    "impossible config": (
        '{"model_type": "qwen2", "hidden_size": "wide"}', (), "cannot be loaded as a causal language model",
    ),
    "GGUF": ('{"model_type": "qwen2"}', ("model.gguf",), "no .*weights; other formats are not read"),
    "pickle": ('{"model_type": "qwen2"}', ("pytorch_model.bin",), "no .*weights; other formats are not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, name):
    config, files, reason = USELESS[name]
    model = ModelConfig(name_or_path=folder_of(tmp_path, config, *files))
    with pytest.raises(UserError, match=reason) as caught:
        model_config(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/model", "no such folder"),
        ("./no/such", "no such folder"),
        ("~/no/such", "no such folder"),
        ("some/model.gguf", "GGUF is not read"),
        ("a b/c?d", "no such folder, and not available from the hub"),
        ("x" * 300, "no such folder, and not available from the hub"),
        ("/" + "x" * 300, "no such folder"),
        ("", "no such folder, and not available from the hub"),
    ],
)
def test_a_name_that_is_no_model_is_refused_in_one_line(name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        model_config(ModelConfig(name_or_path=name))
    assert "\n" not in str(caught.value)


def test_a_revision_of_a_folder_is_refused(tmp_path, monkeypatch):
    """Also where the name could be one of the hub: the folder is what is read."""
    tiny_qwen2().save_pretrained(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "some" / "model"), "some/model"):
        model_folder(ModelConfig(name_or_path=name))
        with pytest.raises(
            UserError, match=rf"^model\.revision=main: model\.name_or_path={name} is a folder"
        ):
            model_folder(ModelConfig(name_or_path=name, revision="main"))
    with pytest.raises(UserError, match=r"^model\.revision=main: model\.name_or_path=s3://b/m is a folder"):
        model_folder(ModelConfig(name_or_path="s3://b/m", revision="main"))


@pytest.mark.parametrize(
    ("model_type", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("mpt", "eager")]
)
def test_the_choice_of_attention_falls_to_eager_where_there_is_no_sdpa(model_type, attention):
    model = ModelConfig(name_or_path="m", attn_implementation="auto")
    assert plain_attention(model, tiny(model_type).config) == attention


def test_an_encoder_is_no_causal_language_model(tmp_path):
    folder = folder_of(tmp_path, '{"model_type": "t5"}')
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model(tmp_path, ModelConfig(name_or_path=folder))


def test_a_buffer_that_is_saved_with_the_weights_is_finite(tmp_path):
    """The routing of DeepSeek-V3 has a bias that is no parameter; a NaN in it leaves the logits finite."""
    shape = tiny("deepseek_v3").config
    shape.update({"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2})
    shape.update({"n_group": 1, "topk_group": 1, "moe_intermediate_size": 8})
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    file, model = tmp_path / "model.safetensors", ModelConfig(name_or_path=str(tmp_path), dtype="float32")
    weights = load_file(file)
    bias = next(name for name in weights if name.endswith("e_score_correction_bias"))
    load_model(tmp_path, model)
    weights[bias][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"NaN or infinite weights in 1 tensors \({re.escape(bias)}\)"):
        load_model(tmp_path, model)


def test_a_config_without_sizes_is_refused_before_a_model_of_them_is_built(tmp_path):
    """The defaults of `llama` are those of 7B parameters: 25 GiB in float32."""
    folder = folder_of(tmp_path, '{"model_type": "llama"}')
    model = ModelConfig(name_or_path=folder, dtype="float32")
    used, limit = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**32, limit))
    try:
        with pytest.raises(UserError, match="the weights are not those of the model: tensors 291 missing"):
            load_model(tmp_path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (used, limit))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 12345678\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer.model", "config.json"])
def test_a_pointer_of_git_lfs_is_called_one(damaged, name):
    model = damaged(untouched)
    (Path(model.name_or_path) / name).write_bytes(POINTER)
    (Path(model.name_or_path) / "consolidated.safetensors").write_bytes(POINTER)  # not read
    with pytest.raises(UserError, match=rf"/{re.escape(name)}: a Git LFS pointer instead of the file"):
        model_folder(model)


def test_a_small_file_that_is_lost_or_cut_is_refused(damaged):
    """transformers takes each of them for one that is not there."""
    model = damaged(untouched)
    file = Path(model.name_or_path) / "generation_config.json"
    content = json.dumps({"eos_token_id": [1, 2]})
    file.write_text(content)
    model_folder(model)
    file.write_text(content[:-3])
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: cannot be read as JSON"):
        model_folder(model)
    file.unlink()
    model_folder(model)
    file.symlink_to("/no/such/file")
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: cannot be read as JSON"):
        model_folder(model)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(UserError, match=r"the tokenizer brings its own code.* model\.trust_remote_code=true"):
        read_tokenizer(tmp_path)
