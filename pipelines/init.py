"""A commented config for a model, preference data and hardware of your own, which are looked at first.

    python -m pipelines.init my.yaml --model Qwen/Qwen2-0.5B-Instruct --data pairs.jsonl

Reads the model's config.json and tokenizer, the format and the lengths of the data, and the GPUs of this
machine; --gpus and --gpu-memory describe a cluster instead. Full fine-tuning is written where a GPU holds it,
else adapters. An existing file is never overwritten.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bdpo.config import Config, parse_config
from bdpo.data.prepare import first_pairs
from bdpo.data.sources import count_rows, open_source
from bdpo.errors import UserError
from bdpo.models.folders import named_folder
from bdpo.models.loading import positions_of
from bdpo.models.tokenizer import ChatTokenizer, faithful_chat
from bdpo.models.tokenizer_files import read_tokenizer, require_chat_template
from pipelines.runtime.cli import exit_codes

LOOKED_AT = 100
"""Rows whose lengths are measured."""

SPARE = 0.9
"""Part of a GPU's memory that a plan may take: allocators leave gaps."""

PLANS: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"lora": {"r": 16, "alpha": 32}, "learning_rate": 1e-5},
    {"lora": {"r": 16, "alpha": 32}, "learning_rate": 1e-5, "gradient_checkpointing": True},
)
"""Keys of `train`, the fastest first: the first that fits is written, and the last where none does."""


@dataclass(frozen=True)
class Hardware:
    """What a run would have: GPUs and the memory of each in GiB; without GPUs the CPUs of one machine."""

    gpus: int
    gpu_memory: int | None

    @classmethod
    def here(cls) -> Hardware:
        """That of this machine."""
        import torch

        gpus = torch.cuda.device_count()
        sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(gpus)]
        return cls(gpus, int(min(sizes) / 2**30) if sizes else None)


@dataclass(frozen=True)
class Found:
    """What was seen of the data: rows, format, and tokens of the longest prompt and pair among the first."""

    rows: int
    format: str
    prompt: int
    pair: int


def chat_of(model: str) -> ChatTokenizer:
    """The tokenizer of a model, without its weights.

    Raises:
        UserError: it cannot be loaded, or its chat template is missing or cannot be used.
    """
    tokenizer = read_tokenizer(named_folder(model, "--model", with_weights=False))
    require_chat_template(tokenizer, f"--model {model}", "a chat model is required")
    return faithful_chat(tokenizer, {}, f"--model {model}")


def look_at(config: Config, chat: ChatTokenizer) -> Found:
    """Read the data of a config: all rows are counted, the first are tokenised.

    Raises:
        UserError: the data cannot be read, or none of the first rows can be used.
    """
    (source,) = config.data.sources()
    pairs, reasons = first_pairs(config.data, chat, LOOKED_AT)
    if not pairs:
        raise UserError(f"--data {source.path}: none of the first rows can be used ({reasons[0]})")
    prompts = [len(ids.prompt) for _, ids in pairs]
    whole = [len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) for _, ids in pairs]
    return Found(count_rows(config.data), open_source(source).format.name, max(prompts), max(whole))


def plan(model: str, data: str, hardware: Hardware) -> tuple[Config, Found]:
    """The config for a model, data and hardware, and what was found.

    Raises:
        UserError: model or data cannot be read.
    """
    from bdpo.training.memory import GIB, memory_need, model_shape

    values: dict[str, Any] = {
        "run_dir": f"runs/{Path(data).stem}",
        "model": {"name_or_path": model, "dtype": "bfloat16" if hardware.gpus else "float32"},
        "data": {"path": data, "max_length": 2**20, "max_prompt_length": 2**19},  # nothing is cut yet
    }
    looked = parse_config(values, "init")
    hf_config, _ = model_shape(looked)
    found = look_at(looked, chat_of(model))
    values["data"] |= _lengths(found, positions_of(hf_config))
    for section in ("score", "evaluate", "train"):
        values[section] = {"workers": hardware.gpus or 1, "gpus_per_worker": 1.0 if hardware.gpus else 0.0}
    values["train"] |= {
        "global_batch_size": 64 if found.rows >= 640 else 16,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "save_minutes": 15.0,
    }
    if hardware.gpu_memory:
        values["train"]["gpu_memory"] = float(hardware.gpu_memory)
    for keys in PLANS:
        config = parse_config({**values, "train": values["train"] | keys}, "init")
        room = hardware.gpu_memory and SPARE * hardware.gpu_memory * GIB
        if not room or memory_need(config, hf_config).gpu_total <= room:
            break
    return config, found


def _lengths(found: Found, positions: int | None) -> dict[str, int]:
    """`max_length` and `max_prompt_length`: half as much again as the longest of the first rows."""
    pair, prompt = (128 * -(-3 * tokens // 256) for tokens in (found.pair, found.prompt))
    pair = min(max(pair, 256), positions or pair)
    return {"max_length": pair, "max_prompt_length": min(prompt, pair // 2 if prompt >= pair else prompt)}


NOTES = {
    "run_dir": "everything that the run makes; on a cluster storage that all nodes share, or s3://",
    "dtype": "what is computed in; training keeps float32 masters",
    "max_length": "tokens of prompt and response; a longer response is cut on the right",
    "max_prompt_length": "a longer prompt is quarantined and counted",
    "alpha": "total of the two weights; 2 would be DPO's",
    "beta": "alpha and beta stand in the loss as their product alone",
    "global_batch_size": "pairs an optimizer step",
    "learning_rate": "1e-6 for full fine-tuning, ten times as much for an adapter",
    "gradient_checkpointing": "true trades time for memory",
    "gpu_memory": "GiB of each GPU: a config that needs more is refused beforehand",
    "lora": "adapters instead of all weights, which no GPU here holds in training",
    "save_minutes": "a kill loses at most so much work",
    "strongreject": "from github.com/alexandrasouly/strongreject",
    "xstest": "from github.com/paul-rottger/xstest",
}
"""Key -> the comment behind it."""

WRITTEN = {
    "run_dir": None,
    "model": ("name_or_path", "dtype"),
    "data": ("path", "format", "max_length", "max_prompt_length"),
    "score": ("workers", "gpus_per_worker"),
    "method": ("name", "alpha", "beta"),
    "train": ("workers", "gpus_per_worker", "gpu_memory", "global_batch_size", "learning_rate", "lora",
              "gradient_checkpointing", "save_minutes"),
    "evaluate": ("workers", "gpus_per_worker"),
}  # fmt: skip
"""Section -> the keys that are written; all others have their defaults, which docs/config.md lists."""


def commented(config: Config, found: Found) -> str:
    """The YAML of a config with the keys that one changes, and what each means."""
    return "\n".join(_lines(config, found)) + "\n"


def _lines(config: Config, found: Found) -> Iterator[str]:
    values = config.model_dump()
    values["data"]["format"] = found.format
    yield f"# {config.model.name_or_path} on {found.rows:,} rows, read as {found.format}; the longest of the"
    yield f"# first {LOOKED_AT} pairs has {found.pair:,} tokens, its prompt at most {found.prompt:,}."
    for section, keys in WRITTEN.items():
        if keys is None:
            yield _line(section, values[section])
            continue
        yield f"\n{section}:"
        for key in keys:
            if values[section].get(key) is not None:
                yield "  " + _line(key, values[section][key])
    for benchmark, file in (("strongreject", "strongreject_dataset.csv"), ("xstest", "xstest_prompts.csv")):
        yield "  " + _line(benchmark, {"path": file})
    yield "  " + _line("judge", {"name": "string_matching"}) + "  # a screen; docs/judges.md has better ones"


def _line(key: str, value: Any) -> str:
    dumped = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=1000)
    line = f"{key}: {dumped.strip()[1:-1]}"
    return f"{line}  # {NOTES[key]}" if key in NOTES else line


def write_config(file: Path, text: str) -> None:
    """Write a new file.

    Raises:
        UserError: it exists, or cannot be written.
    """
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise UserError(f"{file}: exists already, and is not overwritten") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file; exit 0, or 2 if model or data cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the YAML file to write")
    parser.add_argument("--model", required=True, help="a chat model: a folder, or a name on the hub")
    parser.add_argument("--data", required=True, help="preference pairs: a file, or a name on the hub")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of the cluster; by default this machine's"
    )
    parser.add_argument("--gpu-memory", type=int, metavar="GIB", help="memory of each of them")
    given = parser.parse_args(arguments)
    with exit_codes():
        if given.file.exists():
            raise UserError(f"{given.file}: exists already, and is not overwritten")
        hardware = Hardware.here() if given.gpus is None else Hardware(given.gpus, given.gpu_memory)
        config, found = plan(given.model, given.data, hardware)
        write_config(given.file, commented(config, found))
    how = "adapters (LoRA)" if config.train.lora else "all weights"
    where = f"{hardware.gpus} GPUs" if hardware.gpus else "the CPU"
    print(
        f"{given.file}: trains {how} of {given.model} on {where}, from {found.rows:,} rows of {found.format}"
    )
    print(f"next: bdpo preflight --config {given.file}")


if __name__ == "__main__":
    main()
