"""LoRA adapters: put into a model to be trained, or merged into it to be evaluated or exported.

Other kinds of adapters are left out. Requires `peft` (extra `lora`).
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdpo.config import SANDBOX, Config, LoraConfig, ModelConfig
from bdpo.errors import UserError, escaped, first_line
from bdpo.models.folders import named_folder, read_json_object, reason_of, require_readable_files
from bdpo.models.loading import load_model, model_folder, require_finite, without_weights
from bdpo.models.weight_files import counted, require_finite_files, tensor_types
from bdpo.storage.checksums import require_checksums
from bdpo.storage.digests import files_digest
from bdpo.storage.paths import local_path

if TYPE_CHECKING:
    import peft
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from bdpo.models.tokenizer import ChatTokenizer


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PROBE_TOKENS = 32


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
    """Make sure that an adapter is one of its base, complete and finite, and of a kind that can be merged.

    The base's weights are not read. `key` is where the base is named, for errors.

    Raises:
        UserError: it is not; the tensors are named.
    """
    require_finite_files([folder / _WEIGHTS], folder)
    _merged(_adapted(without_weights(model_folder(base, key), base), folder, base.name_or_path), folder)


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

    What is merged is compared with what PEFT computes with the adapter beside its base: log-probs of some
    tokens agree to rounding.

    Raises:
        UserError: `peft` is not installed, or the adapter does not fit the model, cannot be merged, or would
            be another model when merged.
    """
    from bdpo.models.logps import ROUNDING

    adapted = _adapted(load_model(model_folder(base, key), base), folder, base.name_or_path)
    expected = _probe(adapted)
    merged = _merged(adapted, folder)
    require_finite(merged, folder)
    distance = float((_probe(merged) - expected).abs()) / _PROBE_TOKENS**0.5
    if not distance <= ROUNDING[base.dtype]:
        raise UserError(
            f"{folder}: merged into {escaped(base.name_or_path)} the adapter is another model: log-probs "
            f"of {_PROBE_TOKENS} tokens, summed and over the root of their number, are {distance:.3g} nats "
            "from what PEFT computes without merging"
        )
    return merged


def _merged(adapted: PeftModel, folder: Path) -> PreTrainedModel:
    """The model with its adapter in its weights, in place.

    Raises:
        UserError: it is an adapter of another kind.
    """
    config = adapted.active_peft_config
    if config.is_prompt_learning:
        raise UserError(f"{folder}: cannot be merged: {config.peft_type.value} is not an adapter of weights")
    _untie(adapted)
    try:
        merged: PreTrainedModel = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        _raise_out_of_memory(error)
        raise UserError(f"{folder}: cannot be merged ({first_line(error)})") from None
    return merged


def _untie(adapted: PeftModel) -> None:
    """Give an adapted embedding, or output head, a tensor of its own.

    PEFT adapts one of the two. Merged into a tensor that they share it would adapt both (peft#2018).
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = adapted.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        bases: list[Any] = [getattr(end, "base_layer", end) for end in ends]
        inner, head = bases
        if inner.weight is head.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False


def _probe(model: Any) -> torch.Tensor:
    """The log-prob of tokens from all over the vocabulary, each after those before it: their sum, float64."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, _PROBE_TOKENS + 1).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(1, ids[0, 1:, None]).sum()


def _adapted(model: PreTrainedModel, folder: Path, name: str) -> PeftModel:
    """The model, called `name`, with the adapter of a folder put into it, which changes it in place."""
    with _peft_there():
        from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*from a non-meta parameter")  # of a model without weights
            adapted = PeftModel.from_pretrained(model, folder, torch_device="cpu")
    except Exception as error:  # of classes that read what a file of somebody else holds
        _raise_out_of_memory(error)
        reason = reason_of(error, folder / "adapter_config.json")
        raise UserError(f"{folder}: does not fit {escaped(name)} as an adapter ({reason})") from None
    _refuse_incomplete(folder, set(get_peft_model_state_dict(adapted)))
    return adapted


def _raise_out_of_memory(error: Exception) -> None:
    """Raise an error that is none of the adapter."""
    from bdpo.models.oom import out_of_memory  # imports torch

    if out_of_memory(error):
        raise error


def _refuse_incomplete(folder: Path, expected: set[str]) -> None:
    """PEFT leaves a tensor that is missing as it was made up, and warns."""
    there = set(tensor_types(folder / _WEIGHTS))
    # Of an adapted embedding PEFT counts the base model's weight among its own.
    expected, there = (
        {name for name in names if not name.endswith(".base_layer.weight")} for names in (expected, there)
    )
    if found := counted(
        {"missing": sorted(expected - there), "unknown to the model": sorted(there - expected)}
    ):
        raise UserError(f"{folder}: not a complete adapter: tensors {found}")


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
    _require_targets(model, lora, config)
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


def _require_targets(model: PreTrainedModel, lora: LoraConfig, config: peft.LoraConfig) -> None:
    """PEFT adapts what some of the names fit, and says nothing of those that fit no module.

    Raises:
        UserError: there are such names; the first of them is named with the nearest that fits.
    """
    # Of experts, whose weights are parameters of one module, PEFT has taken the names out of its config.
    left = config.target_modules if isinstance(lora.target_modules, list) else ()
    modules = {name for name, _ in model.named_modules()}
    for target in sorted(left or ()):
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            near = difflib.get_close_matches(target, {name.rpartition(".")[2] for name in modules}, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"train.lora.target_modules={lora.target_modules}: no module of the model is called "
                f"{escaped(target)}{hint}"
            )


def export_merged(base: ModelConfig, adapter: Path, chat: ChatTokenizer, folder: Path) -> PreTrainedModel:
    """Write the base model with the adapter merged into it as from_pretrained loads it; returns it."""
    merged = load_adapted(base, adapter)
    merged.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return merged


def exported_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported adapter, by their names in the model to which `add_lora` added it."""
    from safetensors.torch import load_file

    weights = load_file(folder / _WEIGHTS)
    return {
        re.sub(r"\.(lora_\w+)", r".\1.default", name.removeprefix("base_model.model.")): values
        for name, values in weights.items()
    }


def check_lora(config: Config) -> None:
    """Make sure that the adapters of `train.lora` fit the model, without loading its weights.

    Raises:
        UserError: they do not, or `peft` is not installed.
    """
    if config.train.lora:
        import torch

        model = without_weights(model_folder(config.model), config.model)
        with torch.device("meta"):
            add_lora(model, config.train.lora, config.model, config.seed)


@contextmanager
def _peft_there() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UserError("LoRA adapters require peft; pip install 'bdpo[lora]'") from None
