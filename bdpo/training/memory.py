"""The memory that a training needs on each GPU, computed from the config alone: no weights, no GPU.

Parameters, gradients and optimizer states follow DeepSpeed's own bookkeeping. Activations are measured by
running the forward of the training on torch's meta device and adding up the tensors that autograd keeps.
Fragmentation and the CUDA context are not included: leave a tenth of the GPU free.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bdpo.config import SANDBOX, Config, TrainConfig
from bdpo.errors import UserError, first_line
from bdpo.models.adapters import add_lora
from bdpo.models.deepspeed_internals import MAX_LIVE_PARAMETERS, REDUCE_BUCKET
from bdpo.models.loading import model_config, plain_attention
from bdpo.models.logps import CHUNK_ELEMENTS, LogpsModel
from bdpo.models.packing import PrefixGroups
from bdpo.models.row_layout import RowLayout, row_layout
from bdpo.models.transformers_private import attention_of_config, set_attention
from bdpo.storage.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


GIB = 2**30

# Public configs of the presets' models, for machines that cannot reach the hub.
KNOWN_SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
    },
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on each worker by purpose: on its GPU, and offloaded to its node's memory or disk."""

    parameters: int  # their number, not bytes
    gpu: dict[str, int]
    host: dict[str, int]

    @property
    def gpu_total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        """Bytes of one worker outside its GPU."""
        return sum(self.host.values())


def model_shape(config: Config) -> tuple[PreTrainedConfig, str | None]:
    """The architecture from config.json alone, and a note on its source if that is not the model itself.

    Raises:
        UserError: config.json is unavailable, and the model is not one of `KNOWN_SHAPES`.
    """
    from transformers import AutoConfig

    model = config.model
    local = os.path.isfile(local_path(model.name_or_path) / "config.json")
    if local or model.name_or_path == SANDBOX or "://" in model.name_or_path:
        return model_config(model), None
    try:
        hf_config = AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        set_attention(hf_config, plain_attention(model, hf_config))
        return hf_config, None
    except (OSError, ValueError) as error:
        known = dict(KNOWN_SHAPES.get(model.name_or_path, {}))
        if not known:
            raise UserError(
                f"model.name_or_path={model.name_or_path}: config.json is unavailable ({first_line(error)})"
            ) from None
    hf_config = AutoConfig.for_model(known.pop("model_type"), **known)
    set_attention(hf_config, plain_attention(model, hf_config))
    return hf_config, "shape built into bdpo: the hub is unreachable"


def memory_need(config: Config, hf_config: PreTrainedConfig) -> MemoryNeed:
    """The peak memory of one of the fewest `train.workers`, in bytes; `gpu` is its own memory without one."""
    parameters, trainable = parameter_counts(config, hf_config)
    gpu, host = model_state_bytes(config, parameters, trainable)
    how = "layers recomputed" if config.train.gradient_checkpointing else "all layers kept"
    gpu[f"activations, {how}"] = activation_bytes(config, hf_config)
    text = hf_config.get_text_config()
    size = 2 if config.model.dtype == "bfloat16" else 4
    # logits of a chunk in the model's dtype and in float32; the head's gradient in both
    gpu["output head, a chunk at a time"] = (CHUNK_ELEMENTS + text.vocab_size * text.hidden_size) * (4 + size)
    model_file, optimizer_file = _checkpoint_bytes_each(config)
    partitions = config.train.min_workers if config.train.zero_stage else 1
    copied = trainable * model_file + math.ceil(trainable * optimizer_file / partitions)
    own = host if config.train.gpus_per_worker else gpu
    own["copy of a checkpoint's part"] = copied
    if not config.train.gpus_per_worker:
        gpu |= _cpu_bytes(config.train, parameters * size, trainable)
    return MemoryNeed(parameters, gpu, host)


def parameter_counts(config: Config, hf_config: PreTrainedConfig) -> tuple[int, int]:
    """(all parameters, those that are trained): with LoRA the adapters alone, which count among all."""
    model = _meta_model(config, hf_config, hf_config.get_text_config().num_hidden_layers)
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    return sum(count for count, _ in counts), sum(trained for _, trained in counts)


PROCESS = 0.8 * GIB
"""Measured: a worker that has imported torch, transformers, DeepSpeed and Ray."""


def _cpu_bytes(train: TrainConfig, weights: int, trainable: int) -> dict[str, int]:
    """What a worker without a GPU takes beside: on a GPU it is memory of the host.

    AdamW's step computes the square root and the quotient of a partition's second moments, in float32.
    """
    partition = math.ceil(trainable / (train.min_workers if train.zero_stage else 1))
    return {
        "the process": int(PROCESS),
        "weights file, mapped": weights,
        "temporaries of AdamW's step": 0 if train.offload else 8 * partition,
    }


def checkpoint_bytes(config: Config, hf_config: PreTrainedConfig) -> int:
    """The size of a checkpoint, the parts of all workers together, in bytes.

    Of each trained parameter AdamW's two moments, from stage 1 on a float32 copy, and below stage 3 the
    parameter itself; no gradients.
    """
    _, trainable = parameter_counts(config, hf_config)
    return trainable * sum(_checkpoint_bytes_each(config))


def _checkpoint_bytes_each(config: Config) -> tuple[int, int]:
    """Bytes of a trained parameter in a checkpoint: in the model's file and in the optimizer's.

    Under stage 3 the model's file has names and shapes alone: the optimizer's float32 copy is the model.
    """
    stage, size = config.train.zero_stage, 2 if config.model.dtype == "bfloat16" else 4
    return (size if stage < 3 else 0), (12 if stage else 8)


def model_state_bytes(
    config: Config, parameters: int, trainable: int
) -> tuple[dict[str, int], dict[str, int]]:
    """(on the GPU, offloaded): DeepSpeed's model states and buffers, in bytes per worker.

    A parameter takes 2 bytes in bfloat16 and 4 in float32. A trained one also takes a gradient summed in
    float32, AdamW's two moments and, from stage 1 on, a float32 copy (deepspeed.runtime.zero.stage3,
    `estimate_zero3_model_states_mem_needs`).
    """
    train, size = config.train, 2 if config.model.dtype == "bfloat16" else 4

    def of(count: int, stage: int, bytes_each: int) -> int:
        return math.ceil(count * bytes_each / (train.min_workers if train.zero_stage >= stage else 1))

    held = {"parameters": of(parameters, 3, size), "gradients, float32": of(trainable, 2, 4)}
    held["optimizer, float32"] = of(trainable, 1, 12 if train.zero_stage else 8)
    offloaded = set()
    if train.offload:
        offloaded = {"optimizer, float32"} | ({"gradients, float32"} if train.zero_stage > 1 else set())
    if train.offload_parameters:
        offloaded |= {"parameters"}
    gpu = {what: count for what, count in held.items() if what not in offloaded}
    if train.zero_stage == 3:
        gpu["gathered parameters"] = min(parameters, MAX_LIVE_PARAMETERS) * size
        gpu["buffer to reduce gradients"] = min(parameters, REDUCE_BUCKET) * size
    elif train.zero_stage:
        gpu["gradients of a backward"] = of(trainable, 2, size)
    return gpu, {what: count for what, count in held.items() if what in offloaded}


def activation_bytes(config: Config, hf_config: PreTrainedConfig) -> int:
    """Bytes that a micro-batch of the longest pairs keeps for its backward, on a GPU.

    Models of one and of two layers are run: they differ by what a layer keeps. With gradient checkpointing
    each layer keeps its input alone, and one layer at a time keeps everything while it is recomputed.
    """
    groups = _longest_pairs(config, hf_config)
    one, two = (_saved(_meta_model(config, hf_config, layers), config, groups) for layers in (1, 2))
    layer, rest = two - one, 2 * one - two
    layers = hf_config.get_text_config().num_hidden_layers
    if not config.train.gradient_checkpointing:
        return rest + layers * layer
    layout = training_layout(config, hf_config)
    states = int(layout.tokens(groups.lengths).sum()) * layout.hidden_size
    kept = states * (2 if config.model.dtype == "bfloat16" else 4)
    return rest + layer + layers * kept


def require_gpu_memory(config: Config, need: MemoryNeed, gpu_bytes: float | None) -> None:
    """Raise a UserError if the memory of a GPU is known and smaller than the need."""
    if gpu_bytes is not None and need.gpu_total > gpu_bytes:
        largest = max(need.gpu, key=lambda what: need.gpu[what])
        raise UserError(
            f"train: each GPU would need {need.gpu_total / GIB:.1f} GiB and has {gpu_bytes / GIB:.1f}, "
            f"most of it for {largest}; {_advice(config.train)}"
        )


def _advice(train: TrainConfig) -> str:
    steps = {
        "train.zero_stage=3": train.zero_stage < 3,
        "train.gradient_checkpointing=true": not train.gradient_checkpointing,
        "more train.workers": True,
        "train.offload=cpu": not train.offload,
        "a smaller train.tokens_per_micro_batch": True,
    }
    return "try " + ", ".join(step for step, useful in steps.items() if useful)


def gpu_memory(train: TrainConfig) -> float | None:
    """Bytes of one GPU: `train.gpu_memory`, else this machine's, else None."""
    if not train.gpus_per_worker:
        return None
    if train.gpu_memory:
        return train.gpu_memory * GIB
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _meta_model(config: Config, hf_config: PreTrainedConfig, layers: int) -> Any:
    from transformers import AutoModelForCausalLM

    hf_config = copy.deepcopy(hf_config)
    text = hf_config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation="eager" if attention_of_config(hf_config) == "eager" else "sdpa",
            trust_remote_code=config.model.trust_remote_code,
        )
        if config.train.lora:
            add_lora(model, config.train.lora, config.model, config.seed)
    return model.eval()  # training disables dropout


def training_layout(config: Config, hf_config: PreTrainedConfig) -> RowLayout:
    """How the rows of a training are laid out, and how many responses of a pair they hold."""
    return row_layout(hf_config, config.data.max_length, len(config.method.responses))


def _longest_pairs(config: Config, hf_config: PreTrainedConfig) -> PrefixGroups:
    """Pairs of the greatest length that fill a micro-batch, or a single pair that exceeds it."""
    data, budget = config.data, config.train.tokens_per_micro_batch
    prompt, response = data.max_prompt_length, data.max_length - data.max_prompt_length
    layout = training_layout(config, hf_config)
    longest = int(layout.tokens(np.array([[prompt] + [response] * layout.responses]))[0])
    pairs = math.ceil(budget / longest)
    part = min(1.0, budget / pairs / longest) if pairs > 1 else 1.0
    lengths = max(1, int(prompt * part)), max(1, int(response * part))
    return PrefixGroups.of(
        [[number + 1] * lengths[0], *([1] * lengths[1] for _ in range(layout.responses))]
        for number in range(pairs)
    )


def _saved(model: Any, config: Config, groups: PrefixGroups) -> int:
    """Bytes of the tensors that autograd keeps of a forward: each storage once, parameters not counted."""
    policy = LogpsModel(model, config.data.max_length)
    known = {p.untyped_storage()._cdata for p in policy.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with _FlashAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(policy.layout.pack(groups))
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


class _FlashAttention(TorchFunctionMode):
    """Replaces scaled dot-product attention by one that keeps what the memory-efficient GPU kernel keeps.

    On the meta device torch would take the plain implementation, which keeps the whole matrix of scores.
    There no tensor has a value to decide by; transformers asks whether no row is padded, and some row is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Kernel.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        out = torch.empty_like(q)
        bias = None if mask is None else torch.empty_like(mask, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, bias, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        raise NotImplementedError
