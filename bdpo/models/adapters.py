"""LoRA adapters: put into a model to be trained, or merged into it to be evaluated or exported.

Other kinds of adapters are left out. Requires `peft` (extra `lora`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bdpo.config import SANDBOX, Config, LoraConfig, ModelConfig
from bdpo.errors import UserError, escaped, first_line
from bdpo.models.folders import named_folder, read_json_object, require_readable_files
from bdpo.models.loading import architecture, load_model, model_folder, require_finite
from bdpo.models.weight_files import require_finite_files, some_names, tensor_types
from bdpo.storage.checksums import require_checksums
from bdpo.storage.digests import files_digest
from bdpo.storage.paths import local_path

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from bdpo.models.tokenizer import ChatTokenizer


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(name: str, key: str) -> Path:
    """The local folder of an adapter: as named, or the hub's snapshot; `key` is what errors name.

    Raises:
        UserError: there is none, its `adapter_config.json` or `adapter_model.safetensors` is missing or
            damaged, or it was exported here and is not as it was exported.
    """
    folder = named_folder(name, key)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{key}={name}: the folder has no {file}")
    tensor_types(folder / _WEIGHTS)
    require_checksums(folder)
    require_readable_files(folder)
    return folder.resolve()


def adapter_digest(folder: Path) -> str:
    """Digest of the adapter's config and weights."""
    return files_digest([folder / _CONFIG, folder / _WEIGHTS])


def require_complete_adapter(folder: Path, base: ModelConfig, key: str = "model.name_or_path") -> None:
    """Make sure that an adapter is one of its base, complete and finite; the base's weights are not read.

    `key` is where the base is named, for errors.

    Raises:
        UserError: it is not; the tensors are named.
    """
    require_finite_files([folder / _WEIGHTS], folder)
    _adapted(_without_weights(base, key), folder, base.name_or_path)


def base_of(folder: Path) -> ModelConfig:
    """The model, and its revision, that an adapter names as the one that it was trained over.

    Raises:
        UserError: its config names none, or a revision of a folder, which has none.
    """
    file = folder / _CONFIG
    named = read_json_object(file)
    name, revision = named.get("base_model_name_or_path"), named.get("revision")
    if not name or not isinstance(name, str) or not isinstance(revision, str | None):
        raise UserError(f"{file}: names no base_model_name_or_path with a revision or without one")
    if revision and os.path.isdir(local_path(name)):
        raise UserError(
            f"{file}: revision={revision}: base_model_name_or_path={name} is a folder, which has no revisions"
        )
    return ModelConfig(name_or_path=name, revision=revision or None)


def load_adapted(base: ModelConfig, folder: Path, key: str = "model.name_or_path") -> PreTrainedModel:
    """The base model with the adapter merged into its weights, in the base's dtype.

    Raises:
        UserError: `peft` is not installed, or the adapter does not fit the model.
    """
    adapted = _adapted(load_model(model_folder(base, key), base), folder, base.name_or_path)
    merged: PreTrainedModel = adapted.merge_and_unload()
    require_finite(merged, folder)
    return merged


def _adapted(model: PreTrainedModel, folder: Path, name: str) -> PeftModel:
    """The model, called `name`, with the adapter of a folder put into it, which changes it in place."""
    with _peft_there():
        from peft import PeftModel, get_peft_model_state_dict
    from bdpo.models.oom import out_of_memory  # imports torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*from a non-meta parameter")  # of a model without weights
            adapted = PeftModel.from_pretrained(model, folder, torch_device="cpu")
    except Exception as error:  # of classes that read what a file of somebody else holds
        if out_of_memory(error):
            raise
        reason = f"unknown value {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{folder}: does not fit {escaped(name)} as an adapter ({reason})") from None
    _refuse_incomplete(folder, set(get_peft_model_state_dict(adapted)))
    return adapted


def _refuse_incomplete(folder: Path, expected: set[str]) -> None:
    """PEFT leaves a tensor that is missing as it was made up, and warns."""
    there = set(tensor_types(folder / _WEIGHTS))
    # Of an adapted embedding PEFT counts the base model's weight among its own.
    expected, there = ({name for name in names if ".base_layer." not in name} for names in (expected, there))
    wrong = {"missing": expected - there, "unknown to the model": there - expected}
    found = [f"{len(names)} {what} ({some_names(sorted(names))})" for what, names in wrong.items() if names]
    if found:
        raise UserError(f"{folder}: not a complete adapter: tensors {'; '.join(found)}")


def add_lora(model: PreTrainedModel, lora: LoraConfig, base: ModelConfig, seed: int) -> None:
    """Freeze the model and put fresh adapters into it, in place: random A, zero B, so its outputs stay.

    From then on it saves its adapter alone, which names `base` as its model.

    Raises:
        UserError: `peft` is not installed, or the model has no such layers to adapt.
    """
    import torch

    with _peft_there():
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise UserError(f"train.lora.target_modules={lora.target_modules}: {first_line(error)}") from None
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    adapted = [model.get_output_embeddings(), model.get_input_embeddings()]
    if tied and any(isinstance(module, BaseTunerLayer) for module in adapted):
        # PEFT adapts one of the two, which is then no longer the other's transpose; merged they are one
        # tensor again, so that the exported model would not be the trained one (peft#2018).
        raise UserError(
            f"train.lora.target_modules={lora.target_modules}: the embeddings are tied to the output head, "
            "so neither can be adapted"
        )
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(f"train.lora.target_modules={lora.target_modules}: the output head cannot be adapted")
    if base.name_or_path != SANDBOX and not local_path(base.name_or_path).is_dir():
        # From the hub: the adapter is of that model, not of its snapshot on this machine.
        config.base_model_name_or_path, config.revision = base.name_or_path, base.revision


def export_merged(base: ModelConfig, adapter: Path, chat: ChatTokenizer, folder: Path) -> None:
    """Write the base model with the adapter merged into it as from_pretrained loads it."""
    load_adapted(base, adapter).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def check_lora(config: Config) -> None:
    """Make sure that the adapters of `train.lora` fit the model, without loading its weights.

    Raises:
        UserError: they do not, or `peft` is not installed.
    """
    if config.train.lora:
        import torch

        model = _without_weights(config.model, "model.name_or_path")
        with torch.device("meta"):
            add_lora(model, config.train.lora, config.model, config.seed)


def _without_weights(model: ModelConfig, key: str) -> PreTrainedModel:
    """A model on PyTorch's meta device, which has shapes alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture(model_folder(model, key), model), trust_remote_code=model.trust_remote_code
        )
    return built


@contextmanager
def _peft_there() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError("LoRA adapters require peft; pip install 'bdpo[lora]'") from None
