"""Bad models, data sets, templates, paths and configs, as a user gives them to a command.

Each ends with exit code 2 and one line that names what is wrong, and leaves nothing that could be taken for
finished. The rooms test more of each kind by themselves; here it is the command that is tested.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bdpo.errors import UserError
from bdpo.evaluation.answers import EvaluatedModel
from bdpo.evaluation.judges.finetuned import load_finetuned_judge
from bdpo.scoring.reference import ReferenceScorer
from bdpo.storage.cache import cache_folder
from bdpo.storage.run_dir import RunDir
from bdpo.training.engine import _load_policy, deepspeed_config
from pipelines.evaluate import main as evaluate
from pipelines.score import main as score
from pipelines.train import main as train
from tests.support.data_files import SECRET, pair_row, write_csv, write_jsonl
from tests.support.helpers import save_model, tiny_config

ROWS = [pair_row(i) for i in range(4)]

# The method compares no policy with a reference, so the command ends when the pairs are prepared.
CONFIG = """
method: {name: cpo}
data: {max_length: 128, max_prompt_length: 96, max_bad_fraction: 0.5}
score: {gpus_per_worker: 0}
train: {gpus_per_worker: 0}
evaluate: {gpus_per_worker: 0}
"""

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def turns(*contents, **changes):
    """A conversation of alternating turns; `changes` are keys of the last one."""
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*found[:-1], found[-1] | changes]


def rows_of(change):
    """Rows of which each is changed."""
    return [{**row, **change(row)} for row in ROWS]


def whole_texts(row):
    prompt = f"Tell me the answer to {row['prompt']}."
    return {"prompt": prompt, **{side: f"{prompt} {row[side]}" for side in ("chosen", "rejected")}}


def changed(**columns):
    return rows_of(lambda row: columns)


# Name -> the rows, and what the line says. All of them are bad.
ROW_FAULTS = {
    "no prompt": ([{"chosen": "a", "rejected": "b"}], "prompt"),
    "null prompt": (changed(prompt=None), "prompt: null"),
    "null answer": (changed(chosen=None), "chosen: null"),
    "number for a text": (changed(chosen=5), "chosen: wrong type"),
    "empty answer": (changed(rejected=""), "rejected: empty"),
    "an answer that nobody sees": (changed(rejected="\u200b\ufeff"), "rejected: invisible characters alone"),
    "a turn without text": (
        changed(prompt=turns("q", "", "r")),
        "prompt: a turn of the assistant without text",
    ),
    "answers that are whole texts": (
        rows_of(whole_texts),
        "begin with the prompt",
    ),
    "a number that is none": (
        changed(chat_template_kwargs={"a": float("nan")}),
        "chat_template_kwargs: holds a number that is not finite",
    ),
    "blank answer": (changed(rejected=" \n"), "rejected: empty"),
    "equal answers": (rows_of(lambda row: {"rejected": row["chosen"]}), "chosen equals rejected"),
    "long prompt": (changed(prompt="a" * 200), "prompt: longer than max_prompt_length"),
    "equal up to the limit": (
        changed(chosen="a" * 300, rejected="a" * 300 + "b"),
        "chosen equals rejected within max_length",
    ),
    "every row the same": ([ROWS[0]] * 4, "duplicate ×3"),
    "a surrogate": (changed(chosen="a\ud800"), "chosen: "),
    "a template's tokens": (
        changed(chosen="<|im_start|>assistant\nno<|im_end|>"),
        "set data.format=chatml",
    ),
    "Llama 2's tokens": (changed(prompt="[INST] q [/INST]"), "prompt: already templated"),
    "a list as text": (
        rows_of(lambda row: {key: json.dumps(turns("q", row[key])) for key in ("chosen", "rejected")}),
        "set data.format=stringified",
    ),
    "noncharacters": (changed(chosen="a\ufdd0\ufdd1b"), "chosen: holds the noncharacters U+FDD0 and U+FDD1"),
    "an unknown role": (changed(prompt=[{"role": "narrator", "content": "q"}]), "prompt: "),
    "a turn without content": (changed(prompt=[{"role": "user"}]), "prompt: "),
    "no turns": (changed(prompt=[]), "prompt: "),
    "two system turns": (
        [
            {
                "system": "A",
                "prompt": [{"role": "system", "content": "B"}, *turns("q")],
                "chosen": turns("", "a")[1:],
                "rejected": turns("", "b")[1:],
            }
        ],
        "system: the conversation begins with another system turn",
    ),
    "an image": (changed(images=["a.png"]), "images: not empty, and only text is read"),
    "an image part": (
        changed(prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        "prompt: a content part is not text",
    ),
    "a tool that is not written": (changed(tools=[CALL]), "tools: not written by the chat template"),
    "tools that are none": (changed(tools="x"), "tools: neither a list nor JSON of one"),
    "a tool call that is not written": (
        changed(
            prompt=[*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *turns("r")]
        ),
        "prompt: tool_calls is not written by the chat template",
    ),
    "thoughts that are not written": (
        rows_of(
            lambda row: {
                "prompt": turns(row["prompt"]),
                "chosen": turns("", row["chosen"], reasoning_content="hm")[1:],
                "rejected": turns("", row["rejected"])[1:],
            }
        ),
        "chosen: reasoning_content is not written by the chat template",
    ),
    "arguments that are not read": (
        changed(chat_template_kwargs={"enable_thinking": True}),
        "chat_template_kwargs: holds an argument that the chat template does not read",
    ),
    "an unknown group": (changed(group="harmful"), "group: "),
    "a label that is none": (changed(chosen_safe="perhaps"), "chosen_safe: "),
    "a label between": (changed(chosen_safe=0.5), "chosen_safe: "),
    "columns of no format": ([{"text": "a"}], "fit no known format"),
    "a transcript with an odd end": (
        [{"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}] * 2,
        "bad, more than data.max_bad_fraction",
    ),
    "two prompts in one row": (
        [
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: other\n\nAssistant: b",
            }
        ],
        "bad, more than data.max_bad_fraction",
    ),
}

LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()

# Name of the file -> its content, and what the line says.
FILE_FAULTS = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "list.json": (b"[]", "is empty"),
    "number.json": (b"5", "expects a list of rows, found int"),
    "cut.json": (json.dumps(ROWS).encode()[:-9], "not valid JSON"),
    "text.jsonl": (b"hello\nworld\n", "no row can be read"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "page.jsonl": (b"<!doctype html><html>not found</html>\n", "no row can be read"),
    "twice.csv": (b"prompt,chosen,rejected,chosen\nq,a,b,c\n", "the column chosen stands 2 times"),
    "header.csv": (b"prompt,chosen,rejected\n", "is empty"),
    "latin.jsonl": ('{"prompt": "\xe9"}'.encode("latin-1"), "row 1: not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(LINES * 99, mtime=0)[:60], "cannot be read after row"),
    "plain.jsonl.zst": (LINES, "cannot be read after row 0"),
    "magic.parquet": (b"PAR1", "cannot be read after row 0"),
    "archive.zip": (b"PK\x03\x04", "unknown suffix"),
    "tabs.csv": (b"prompt\tchosen\trejected\nq\ta\tb\n", r"its columns are separated by '\t'"),
    "quoted.csv": (b'"prompt";"chosen";"rejected"\n"q";"a";"b"\n', "its columns are separated by ';'"),
    "odd.csv": (b'"prompt"s,chosen,rejected\nq,a,b\n', "not valid CSV at line 1"),
    "packed.jsonl": (gzip.compress(LINES, mtime=0), "is compressed with gzip, which its name does not say"),
    "table.json": (b"PAR1", "its content is Parquet, which its name does not say"),
    "sheet.xlsx": (b"PK\x03\x04", "unknown suffix"),
    "control\x1b[2J.jsonl": (b"", r"key data.path: holds the character '\x1b'"),
    "right\u202eleft.jsonl": (b"", "is empty"),
}


def misread_parquet(folder):
    pq.write_table(
        pa.table({"prompt": [1, 2], "chosen": ["a", "b"], "rejected": ["c", "d"]}), folder / "p.parquet"
    )
    return [f"data.path={folder}/p.parquet"]


def folder_of_other_columns(folder):
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "a.jsonl", ROWS)
    write_jsonl(folder / "data" / "b.jsonl", [{"other": 1}])
    return [f"data.path={folder}/data"]


def folder_without_data(folder):
    (folder / "data").mkdir()
    return [f"data.path={folder}/data"]


def pipe(folder):
    os.mkfifo(folder / "pipe.jsonl")
    return [f"data.path={folder}/pipe.jsonl"]


def unreadable_bytes(folder):
    """A file of which no byte can be read."""
    (folder / "rows.jsonl").symlink_to("/proc/self/mem")
    return [f"data.path={folder}/rows.jsonl"]


def too_few_of_a_group(folder):
    return [f"data.path={write_jsonl(folder / 'rows.jsonl', changed(group='safe'))}", "data.sample={safe: 9}"]


def no_group_to_sample(folder):
    return [f"data.path={write_jsonl(folder / 'rows.jsonl', ROWS)}", "data.sample={safe: 1, unsafe: 1}"]


def sound(*overrides):
    """Sound data, and overrides that are wrong."""
    return lambda folder: [f"data.path={write_csv(folder / 'rows.csv', ROWS)}", *overrides]


OTHER_FAULTS = {
    "a column of numbers": (misread_parquet, "prompt: wrong type"),
    "files of other columns": (
        folder_of_other_columns,
        "data, b.jsonl: columns 1 unknown fit no known format",
    ),
    "a folder without data": (folder_without_data, "as a data set of split train it cannot be loaded"),
    "a pipe": (pipe, "pipe.jsonl: is neither a file nor a folder"),
    "no byte can be read": (unreadable_bytes, "rows.jsonl: cannot be read"),
    "too few of a group": (too_few_of_a_group, "data.sample.safe=9: "),
    "no group to sample by": (no_group_to_sample, "has no group"),
    "a path of nothing": (lambda folder: ["data.path=''"], "data.path: is empty"),
    "no file": (lambda folder: [f"data.path={folder}/none.jsonl"], "none.jsonl: no such file or folder"),
    "a directory of no such name": (sound("model.name_or_path=/no/such"), "/no/such: no such folder"),
    "a name of 300 characters": (sound(f"model.name_or_path={'x' * 300}"), "not available from the hub"),
    "a model of nobody": (sound("model.name_or_path=~nobody-here/x"), "~nobody-here/x: no such folder"),
    "data of nobody": (lambda folder: ["data.path=~nobody-here/x"], "data.path=~nobody-here/x: no such file"),
    "a run folder of nobody": (sound("run_dir=~nobody-here/x"), "run_dir=~nobody-here/x: no user"),
    "a column that is not there": (sound("data.columns={prompt: question}"), "question: data.path="),
    "a column of no format": (sound("data.columns={nonesuch: prompt}"), "data.columns.nonesuch: no format"),
    "an unknown format": (sound("data.format=alpaca2"), "data.format=alpaca2"),
    "the wrong format": (sound("data.format=pku_saferlhf"), "read as pku_saferlhf are bad"),
    "an unknown key": (sound("data.max_len=3"), "data.max_len"),
    "a limit of nothing": (sound("data.limit=0"), "data.limit"),
    "a prompt longer than a row": (sound("data.max_prompt_length=400"), "max_prompt_length"),
    "more positions than the model has": (sound("data.max_length=4096"), "data.max_length=4096"),
    "arguments that are a list": (sound("model.template_kwargs=[1]"), "model.template_kwargs"),
    "arguments of the renderer": (sound("model.template_kwargs={messages: 1}"), "messages"),
    "no template of that name": (sound("model.chat_template=/no.jinja"), "model.chat_template=/no.jinja"),
    "a revision of a folder": (sound("model.revision=main"), "is a folder, which has no revisions"),
    "a split of a file": (sound("data.split=test"), "is a file, which has no splits; leave it out"),
    "a date for a text": (sound("model.revision=2026-02-30"), "override model.revision"),
    "a key twice": (sound("train={workers: 1, workers: 2}"), "override train"),
    "labels of no kind": (sound("data.labels={group: blue}"), "data.labels.group"),
    "a path of 5,000 characters": (lambda folder: ["data.path=" + "a" * 5000], "override data.path"),
    "no place to write": (sound("run_dir=/dev/null/run"), "run_dir=/dev/null/run: cannot be written"),
}


def edited(name, content):
    """A change of a file of the model folder; without content it is removed."""

    def change(model):
        if content is None:
            (model / name).unlink()
        else:
            (model / name).write_bytes(content)

    return change


def config_with(**values):
    def change(model):
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def cut_weights(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def folder_for_weights(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def link_for_weights(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/no/such/model.safetensors")


def weights_of_8_bits(model):
    """transformers takes them for numbers, without the scales that make them weights."""
    file = model / "model.safetensors"
    save_file({name: one.to(torch.int8) for name, one in load_file(file).items()}, file, {"format": "pt"})


def without_a_shard(model):
    weights = load_file(model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")


def second_weights(model):
    shutil.copy(model / "model.safetensors", model / "best.safetensors")


def model_and_adapter(model):
    (model / "adapter_config.json").write_text("{}")


def templates_without_default(model):
    (model / "additional_chat_templates").mkdir()
    (model / "chat_template.jinja").rename(model / "additional_chat_templates" / "tool_use.jinja")


def only_an_adapter(model):
    for file in ("config.json", "model.safetensors"):
        (model / file).unlink()
    (model / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, model / "adapter_model.safetensors")


def own_tokenizer(model):
    (model / "tokenizer.json").unlink()
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    (model / "tokenization_own.py").write_text("raise SystemExit('this code was run')")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 12345678\n"

# Name -> what is done to the model folder, and what the line says.
MODEL_FAULTS = {
    "no config": (edited("config.json", None), "the folder has no config.json"),
    "an adapter": (only_an_adapter, "holds an adapter without its base"),
    "a config that is no JSON": (edited("config.json", b"{"), "config.json: cannot be read as JSON"),
    "a config that is null": (edited("config.json", b"null"), "config.json: holds no JSON object"),
    "a config without a type": (edited("config.json", b"{}"), "knows no model of this type"),
    "a config without sizes": (
        edited("config.json", b'{"model_type": "llama"}'),
        "the weights are not those of the model: tensors 270 missing",
    ),
    "a config with a key twice": (
        edited("config.json", b'{"model_type": "llama", "model_type": "qwen2"}'),
        "config.json: the key model_type stands twice",
    ),
    "a head beside the embeddings that it is tied to": (
        config_with(tie_word_embeddings=True),
        "lm_head.weight and model.embed_tokens.weight differ, while config.json ties them",
    ),
    "a config of impossible layers": (
        config_with(num_hidden_layers="two"),
        "cannot be loaded as a causal language model (Validation error for field 'num_hidden_layers'",
    ),
    "an unknown type": (config_with(model_type="nonesuch"), "knows no model of this type"),
    "a generation config of another type": (
        edited("generation_config.json", b"[1]"),
        "generation_config.json: holds no JSON object",
    ),
    "a cut generation config": (
        edited("generation_config.json", b'{"eos_token_id": [1, '),
        "generation_config.json: cannot be read as JSON",
    ),
    "an end of turn by name": (
        edited("generation_config.json", b'{"eos_token_id": ["</s>"]}'),
        "generation_config.json: eos_token_id is neither a token id nor a list of them",
    ),
    "a tokenizer config of another type": (
        edited("tokenizer_config.json", b"[]"),
        "tokenizer_config.json: holds no JSON object",
    ),
    "a tokenizer with code of its own": (
        own_tokenizer,
        "the tokenizer brings its own code, which is not run; model.trust_remote_code=true",
    ),
    "a tokenizer that is a pointer": (edited("tokenizer.json", POINTER), "tokenizer.json: a Git LFS pointer"),
    "weights that are a pointer": (edited("model.safetensors", POINTER), "safetensors: a Git LFS pointer"),
    "a tokenizer of another type": (edited("tokenizer.json", b"[]"), "no tokenizer can be loaded"),
    "weights that are a folder": (folder_for_weights, "model.safetensors: damaged weights"),
    "weights that lie elsewhere": (link_for_weights, "model.safetensors: damaged weights"),
    "a rope of no kind": (
        config_with(rope_scaling={"rope_type": "spiral"}),
        "config.json: rope_scaling.rope_type=spiral is unknown",
    ),
    "an activation of no kind": (
        config_with(hidden_act="bend"),
        "config.json: hidden_act=bend is unknown",
    ),
    "a vocabulary of words": (config_with(vocab_size="many"), "Validation error for field 'vocab_size': "),
    "quantised weights": (
        config_with(quantization_config={"quant_method": "fp8"}),
        "config.json is of quantised weights, which are not read",
    ),
    "weights of 8 bits": (weights_of_8_bits, "quantised weights are not read (lm_head.weight is I8)"),
    "no weights": (edited("model.safetensors", None), "no *.safetensors weights"),
    "weights that are no weights": (edited("model.safetensors", b"x" * 99), "damaged weights"),
    "cut weights": (cut_weights, "damaged weights"),
    "a shard too few": (without_a_shard, "model-00002-of-00002.safetensors"),
    "two files of weights": (second_weights, "best.safetensors holds other weights of the model"),
    "a model and an adapter": (model_and_adapter, "the folder holds a model and an adapter"),
    "no tokenizer": (edited("tokenizer.json", None), "no tokenizer can be loaded"),
    "a cut tokenizer": (edited("tokenizer.json", b'{"version": "1.0",'), "no tokenizer can be loaded"),
    "fewer embeddings than ids": (config_with(vocab_size=100), "the model has 100 embeddings"),
    "no template": (edited("chat_template.jinja", None), "the tokenizer has no chat template"),
    "templates without a default": (
        templates_without_default,
        "of the tokenizer's chat templates (tool_use) none is called default",
    ),
    "a template that is none": (edited("chat_template.jinja", b"{% for"), "cannot be rendered"),
    "a template that fails": (edited("chat_template.jinja", b"{{ 1 / 0 }}"), "cannot be rendered"),
    "a template without an end": (
        edited("chat_template.jinja", b"{{ messages[9 - 9].nothing.at.all }}"),
        "cannot be rendered",
    ),
    "a template that never ends": (
        edited("chat_template.jinja", b"{% for i in range(999999999) %}a{% endfor %}"),
        "cannot be rendered",
    ),
    "a template that loses answers": (
        edited("chat_template.jinja", b"{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}"),
        "does not contain its own text",
    ),
    "a template without a generation prompt": (
        edited(
            "chat_template.jinja",
            b"{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        ),
        "does not write an answer where its generation prompt ends",
    ),
}


def with_weights(change):
    """The weights of a model folder are changed."""

    def save(model):
        file = model / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return save


BENCHMARK = ("evaluate.benchmarks=[strongreject]", "evaluate.strongreject.path=sandbox")

# Name -> what is done to the model folder, and the tensors that the line names.
WEIGHT_FAULTS = {
    "some are missing": (
        with_weights(lambda found: {name: one for name, one in found.items() if ".mlp." not in name}),
        "tensors 6 missing (model.layers.0.mlp.down_proj.weight, ",
    ),
    "all are renamed": (
        with_weights(lambda found: {f"module.{name}": one for name, one in found.items()}),
        "unknown to the architecture (module.lm_head.weight, ",
    ),
    "one of another shape": (
        with_weights(lambda found: found | {"model.norm.weight": torch.ones(31)}),
        "tensors 1 of another shape (model.norm.weight)",
    ),
}


JUDGE_FAULTS = WEIGHT_FAULTS | {
    "one is not a number": (
        with_weights(lambda found: found | {"model.norm.weight": torch.full((32,), torch.nan)}),
        "NaN or infinite weights in 1 tensors (model.norm.weight)",
    )
}


# Name -> what is done to the folder of a judge, and what the line says.
JUDGE_FOLDER_FAULTS = {
    name: MODEL_FAULTS[name]
    for name in [
        "no tokenizer",
        "a cut tokenizer",
        "a tokenizer with code of its own",
        "a tokenizer that is a pointer",
        "weights that are a pointer",
        "a config that is null",
        "a cut generation config",
    ]
} | {
    "an empty tokenizer": (edited("tokenizer.json", b"{}"), "no tokenizer can be loaded"),
    "no config": (edited("config.json", None), "config.json"),
}


def adapter_with(**values):
    def change(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def adapter_weights(change):
    def save(adapter):
        file = adapter / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return save


# Name -> what is done to the folder of an adapter, and what the line says.
ADAPTER_FAULTS = {
    "junk for weights": (
        edited("adapter_model.safetensors", b"junk"),
        "adapter_model.safetensors: damaged weights",
    ),
    "weights that are a pointer": (
        edited("adapter_model.safetensors", POINTER),
        "adapter_model.safetensors: a Git LFS pointer",
    ),
    "no config": (edited("adapter_config.json", None), "adapter_config.json"),
    "a config that is a list": (edited("adapter_config.json", b"[]"), "adapter_config.json: holds no JSON"),
    "a kind that PEFT does not know": (
        adapter_with(peft_type="NONESUCH"),
        "adapter_config.json: peft_type=NONESUCH is unknown",
    ),
    "another rank": (adapter_with(r=3), "does not fit"),
    "modules that the model lacks": (adapter_with(target_modules=["nonesuch"]), "does not fit"),
    "a tensor too few": (
        adapter_weights(lambda found: dict(list(found.items())[1:])),
        "not a complete adapter: tensors 1 missing (base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    ),
    "one is not a number": (
        adapter_weights(lambda found: {name: one * torch.nan for name, one in found.items()}),
        "NaN or infinite weights in 4 tensors (base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    ),
}


def rows_fault(name):
    rows, said = ROW_FAULTS[name]
    return (lambda folder: [f"data.path={write_jsonl(folder / 'rows.jsonl', rows)}"]), said


def file_fault(name):
    content, said = FILE_FAULTS[name]

    def make(folder):
        (folder / name).write_bytes(content)
        return [f"data.path={json.dumps(str(folder / name))}"]

    return make, said


def model_fault(name, model):
    change, said = MODEL_FAULTS[name]

    def make(folder):
        shutil.copytree(model, folder / "model")
        change(folder / "model")
        return [*sound()(folder), f"model.name_or_path={folder}/model"]

    return make, said


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_chat):
    return save_model(tmp_path_factory.mktemp("model"), tiny_chat)


@pytest.fixture
def ends(tmp_path, model, capsys):
    """ends(make, said): the command of what `make` gives ends with one line that says it."""

    def run(make, said, main=score):
        (tmp_path / "config.yaml").write_text(CONFIG)
        overrides = [f"run_dir={tmp_path}/run", f"model.name_or_path={model}", "model.dtype=float32"]
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(tmp_path / "config.yaml"), *overrides, *make(tmp_path)])
        printed = capsys.readouterr().err
        line = printed.splitlines()[-1]
        assert ended.value.code == 2, printed
        assert line.startswith("error: ")
        assert printed.count("error: ") == 1
        assert said in line
        assert line.isprintable()
        assert SECRET not in printed
        assert "newly initialized" not in printed  # the advice of transformers
        run = RunDir(str(tmp_path / "run"))
        assert not (run.data / "manifest.json").exists()
        assert not run.pairs.exists()

    return run


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_rows_that_cannot_be_used(ends, name):
    ends(*rows_fault(name))


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_files_that_cannot_be_read(ends, name):
    ends(*file_fault(name))


@pytest.mark.parametrize("name", OTHER_FAULTS)
def test_paths_and_keys_that_are_wrong(ends, name):
    ends(*OTHER_FAULTS[name])


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_model_folders_that_are_none(ends, model, name):
    ends(*model_fault(name, model))


@pytest.mark.parametrize("name", WEIGHT_FAULTS)
@pytest.mark.parametrize("command", [score, train, evaluate])
def test_weights_that_are_not_complete_are_refused_before_anything_starts(ends, model, command, name):
    change, said = WEIGHT_FAULTS[name]

    def make(folder):
        shutil.copytree(model, folder / "model")
        change(folder / "model")
        return [*sound()(folder), f"model.name_or_path={folder}/model", *BENCHMARK]

    ends(make, said, command)


def test_a_training_that_requires_scores_looks_at_the_model_before_them(ends, model):
    change, said = WEIGHT_FAULTS["some are missing"]

    def make(folder):
        shutil.copytree(model, folder / "model")
        change(folder / "model")
        return [*sound()(folder), f"model.name_or_path={folder}/model", "method.name=bdpo"]

    ends(make, said, train)
    ends(sound("method.name=bdpo"), "no prepared pairs; run `python -m pipelines.score` first", train)


@pytest.mark.parametrize("name", [*JUDGE_FAULTS, *JUDGE_FOLDER_FAULTS])
@pytest.mark.parametrize("kind", ["finetuned", "llama_guard"])
def test_and_so_are_those_of_a_judge(ends, model, tmp_path, kind, name):
    change, said = (JUDGE_FAULTS | JUDGE_FOLDER_FAULTS)[name]

    def make(folder):
        shutil.copytree(model, folder / "judge")
        change(folder / "judge")
        judge = f"evaluate.judge={{name: {kind}, model: {folder}/judge}}"
        return [*sound()(folder), judge, *BENCHMARK]

    ends(make, said, evaluate)
    assert not RunDir(str(tmp_path / "run")).responses("base").exists()


@pytest.mark.parametrize("kind", ["finetuned", "harmbench"])
@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("/no/such", "evaluate.judge.model=/no/such: no such folder"),
        ("x" * 300, f"evaluate.judge.model={'x' * 300}: no such folder, and not available from the hub"),
        ("~/judge", "NaN or infinite weights in 1 tensors (model.norm.weight)"),
    ],
)
def test_the_name_of_a_judge(ends, model, tmp_path, monkeypatch, kind, judge, said):
    shutil.copytree(model, tmp_path / "judge")
    JUDGE_FAULTS["one is not a number"][0](tmp_path / "judge")
    monkeypatch.setenv("BDPO_CACHE", str(cache_folder()))  # else the sandbox is made in the other home
    monkeypatch.setenv("HOME", str(tmp_path))
    judges = f"evaluate.judge={{name: {kind}, model: {judge}}}"
    ends(sound(judges, *BENCHMARK), said, evaluate)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model, tiny_chat):
    """A sound adapter over the model, with a tokenizer, as a judge has one."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    tiny_chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("as_judge", [False, True])
@pytest.mark.parametrize("name", ADAPTER_FAULTS)
def test_adapters_that_are_none(ends, adapter, tmp_path, as_judge, name):
    change, said = ADAPTER_FAULTS[name]

    def make(folder):
        shutil.copytree(adapter, folder / "adapter")
        change(folder / "adapter")
        judge = f"evaluate.judge={{name: finetuned, model: {folder}/adapter}}"
        named = judge if as_judge else f"evaluate.adapter={folder}/adapter"
        return [*sound()(folder), named, *BENCHMARK]

    ends(make, said, evaluate)
    assert not RunDir(str(tmp_path / "run")).responses("base").exists()


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "names no base_model_name_or_path"),
        ("", "names no base_model_name_or_path"),
        ("/no/such", "adapter_config.json: base_model_name_or_path=/no/such: no such folder"),
        ("x" * 300, f"base_model_name_or_path={'x' * 300}: no such folder, and not available"),
    ],
)
def test_the_base_of_an_adapter_that_judges(ends, adapter, base, said):
    def make(folder):
        shutil.copytree(adapter, folder / "adapter")
        adapter_with(base_model_name_or_path=base)(folder / "adapter")
        judge = f"evaluate.judge={{name: finetuned, model: {folder}/adapter}}"
        return [*sound()(folder), judge, *BENCHMARK]

    ends(make, said, evaluate)


@pytest.mark.parametrize("kind", ["finetuned", "harmbench", "llama_guard", "wildguard"])
def test_a_judge_that_was_never_trained_is_refused_before_anything_is_answered(ends, model, tmp_path, kind):
    def make(folder):
        judge = f"evaluate.judge={{name: {kind}, model: {model}}}"
        return [*sound()(folder), judge, *BENCHMARK]

    ends(make, "known answers right, so its verdicts mean nothing", evaluate)
    assert not RunDir(str(tmp_path / "run")).responses("base").exists()


def score_with(config):
    ReferenceScorer(config, "cpu")


def train_with(config):
    _load_policy(config, deepspeed_config(config))


def answer_with(config):
    EvaluatedModel(config.model).load()


def judge_with(config):
    load_finetuned_judge(config.model.name_or_path, on_gpu=False)


@pytest.mark.parametrize("load", [score_with, train_with, answer_with, judge_with])
def test_weights_that_are_no_numbers_are_refused_where_they_are_read(tmp_path, model, load):
    shutil.copytree(model, tmp_path / "model")
    with_weights(lambda found: found | {"model.norm.weight": torch.full((32,), torch.nan)})(
        tmp_path / "model"
    )
    config = tiny_config(tmp_path, tmp_path / "model", tmp_path, train={"zero_stage": 1})
    with pytest.raises(
        UserError, match=r"model: NaN or infinite weights in 1 tensors \(model\.norm\.weight\)$"
    ):
        load(config)


def test_there_are_enough_of_them():
    counts = {
        "rows": len(ROW_FAULTS),
        "files": len(FILE_FAULTS),
        "paths and keys": len(OTHER_FAULTS),
        "model folders": len(MODEL_FAULTS),
        "judges": 2 * len(JUDGE_FOLDER_FAULTS),
        "adapters": 2 * len(ADAPTER_FAULTS),
        "weights": 4 * (len(WEIGHT_FAULTS) + 1),
    }
    print(f"bad inputs: {sum(counts.values())} ({counts})")
    assert sum(counts.values()) >= 60
