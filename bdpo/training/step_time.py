"""The time of an optimizer step, modelled from counts: operations, bytes, launches, communication.

A model and no measurement: it shows what a step is bound by and what a setting would change. Work of the GPU,
of the host and of the network is taken to overlap, so that the longest of the three is the step. Of a mixture
of experts all experts are counted for every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bdpo.config import Config
from bdpo.models.logps import CHUNK_ELEMENTS
from bdpo.training.memory import parameter_counts, training_layout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GPU = "H100"
PEAK, BANDWIDTH = 989e12, 3.35e12
"""Operations (dense bfloat16) and bytes of memory of this GPU a second, by its data sheet."""

ATTAINED = 0.7
"""Share of the peak that large matrix products reach."""

NODE_GPUS, NVLINK, NETWORK = 8, 360e9, 40e9
"""GPUs of a node; bytes a second that each of them receives from its own node and from others."""

HOST_MS = {0: 1.5, 1: 1.4, 2: 2.3, 3: 7.0}
"""Milliseconds of the host for a layer and a micro-step, by ZeRO stage: an assumption, which is the times of
28 layers of width 64 in one process on a CPU, where the layers themselves take almost none of it."""

PAIR = (50, 125, 125)
"""Tokens of prompt and responses of safety data."""


@dataclass(frozen=True)
class StepTime:
    """An optimizer step of the busiest worker: counts, and seconds of each that it needs."""

    tokens: int
    micro_steps: int
    operations: float
    traffic: float
    """Bytes that the GPU reads and writes in its memory."""
    communication: float
    """Bytes that the worker receives from others."""
    host: float
    """Seconds of the host, which launches kernels and runs the hooks of ZeRO."""
    workers: int
    required: float
    """Operations that the step requires, 6 a token and parameter: what MFU counts."""

    @property
    def gpu(self) -> float:
        """Seconds of the GPU: matrix products, then the traffic of everything else."""
        return self.operations / (PEAK * ATTAINED) + self.traffic / BANDWIDTH

    @property
    def network(self) -> float:
        """Seconds of communication."""
        return self.communication / (NVLINK if self.workers <= NODE_GPUS else NETWORK)

    @property
    def seconds(self) -> float:
        """The longest of what overlaps."""
        return max(self.gpu, self.network, self.host)

    @property
    def mfu(self) -> float:
        """Share of the peak that the required operations are."""
        return self.required / PEAK / self.seconds


def step_time(config: Config, hf_config: PreTrainedConfig) -> StepTime:
    """The modelled step of a training on GPUs of the kind `GPU`, on pairs as long as `PAIR`."""
    train, size = config.train, 2 if config.model.dtype == "bfloat16" else 4
    workers, stage, recomputed = train.min_workers, train.zero_stage, int(train.gradient_checkpointing)
    text, layout = hf_config.get_text_config(), training_layout(config, hf_config)
    lengths = PAIR[: 1 + layout.responses]
    pairs = max(1.0, train.global_batch_size / workers)
    of_pair = int(layout.tokens(np.array([lengths]))[0])
    micro_steps = math.ceil(pairs * of_pair / train.tokens_per_micro_batch)
    _, width = layout.grid([of_pair] * math.ceil(pairs / micro_steps))
    tokens, responses = round(pairs * of_pair), pairs * sum(lengths[1:])
    parameters, trained = parameter_counts(config, hf_config)
    layers, head = _layers_and_head(parameters, hf_config)
    passes = 2 + recomputed + trained / parameters  # forward, gradients of inputs, again, of weights
    of_head = 2 * head * responses * (2 + trained / parameters)
    operations = passes * forward_operations(text, layers, tokens, width) + of_head
    share = workers if stage else 1
    return StepTime(
        tokens=tokens,
        micro_steps=micro_steps,
        operations=operations,
        traffic=micro_steps * size * parameters * (2 + recomputed)
        + _activation_traffic(text, tokens, size) * (3 + recomputed)
        + _head_traffic(text, responses, micro_steps, size)
        + 30 * trained / share,  # AdamW: weight, moments and gradient in float32, and the weight it writes
        communication=_communication(stage, workers, micro_steps, size * parameters, size * trained),
        host=micro_steps * text.num_hidden_layers * HOST_MS[stage] / 1000 * (1 + recomputed / 3),
        workers=workers,
        required=6 * (layers + head) * train.global_batch_size * of_pair / workers,
    )


def estimation_share(config: Config, hf_config: PreTrainedConfig) -> float:
    """Operations of an estimation of the policy's mutual information, as a share of an epoch's.

    Both are of pairs as long as `PAIR`, without attention: two forwards, behind the prompt and alone, against
    forward and backward.
    """
    layout = training_layout(config, hf_config)
    parameters, trained = parameter_counts(config, hf_config)
    layers, head = _layers_and_head(parameters, hf_config)
    tokens, responses = int(layout.tokens(np.array([PAIR]))[0]), sum(PAIR[1:])
    passes = 2 + trained / parameters
    of_training = layers * tokens * (passes + config.train.gradient_checkpointing) + head * responses * passes
    return (layers * (tokens + responses) + 2 * head * responses) / of_training


def _layers_and_head(parameters: int, hf_config: PreTrainedConfig) -> tuple[int, int]:
    """Of all parameters those of the layers, and those of the head; the embeddings multiply nothing."""
    text = hf_config.get_text_config()
    head = text.vocab_size * text.hidden_size
    return parameters - (head if hf_config.tie_word_embeddings else 2 * head), head


def forward_operations(text: PreTrainedConfig, layers: int, tokens: float, width: int) -> float:
    """Operations of a forward without the head: 2 a token and parameter of the layers, and attention."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * layers * tokens + 4 * text.num_hidden_layers * heads * head_dim * tokens * width


def _activation_traffic(text: PreTrainedConfig, tokens: float, size: int) -> float:
    """Bytes of a forward between its matrix products: norms, rotary embedding, SwiGLU, residuals."""
    a_token = 16 * text.hidden_size + 5 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return size * tokens * text.num_hidden_layers * a_token


def _head_traffic(text: PreTrainedConfig, responses: float, micro_steps: int, size: int) -> float:
    """Bytes of the head: logits in both precisions three times, and its gradient added up chunk by chunk."""
    logits = responses * text.vocab_size
    chunks = max(micro_steps, math.ceil(logits / CHUNK_ELEMENTS))
    return 3 * (4 + size) * logits + chunks * 2 * (4 + size) * text.vocab_size * text.hidden_size


def _communication(stage: int, workers: int, micro_steps: int, weights: int, gradients: int) -> float:
    """Bytes that a worker receives in a step, of `weights` and `gradients` bytes of all parameters."""
    moved = {
        0: 2 * gradients,  # all-reduce
        1: 2 * gradients,  # reduce-scatter, then the new weights are gathered
        2: (micro_steps + 1) * gradients,
        3: micro_steps * (2 * weights + gradients),  # gathered for the forward and for the backward
    }
    return moved[stage] * (workers - 1) / workers
