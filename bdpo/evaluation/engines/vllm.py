"""vLLM as an engine for `bdpo.evaluation.engines.hf`: the same ids go in, the same stops end an answer.

Token ids go in and out, vLLM loads no tokenizer; the text is made as for the other engine. The seeds are the
same too, but not what vLLM's sampler makes of them, so samples of two engines differ. Greedy answers agree up
to rounding, which on a GPU depends on the batch.

`vllm.LLM` inside the answering actor, not `ray.data.llm`: there, prompts and answers would be columns that
pass through Ray's object store (which spills to disk, outside `private/`), and a shard would be committed by
another stage than the one that made it.

Written against vLLM 0.33.0. It requires the extra `vllm` and a GPU. Left out: adapters, engines over
several nodes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bdpo.config import ModelConfig
from bdpo.errors import UserError, first_line
from bdpo.evaluation.engines.base import Answer, Sampling
from bdpo.evaluation.engines.hf import (
    answer,
    begun_ids,
    require_positions,
    shipped_generation_config,
    stop_ids,
)
from bdpo.models.loading import model_config, model_folder
from bdpo.models.template import Message
from bdpo.models.tokenizer import ChatTokenizer

_MEMORY = 0.9  # of what an actor has of a GPU: vLLM takes it all at once, for weights and KV cache


class VLLMEngine:
    """A `bdpo.evaluation.engines.base.Generate` for prompts no longer than those named when it is made."""

    def __init__(
        self,
        model: ModelConfig,
        chat: ChatTokenizer,
        prompt_ids: list[list[int]],
        max_new_tokens: int,
        gpus: float,
    ) -> None:
        """`prompt_ids`: every prompt that there will be; `gpus`: what is there for it, see `engine_settings`.

        Raises:
            UserError: vLLM cannot be imported, or a prompt and its answer need more positions than there are.
        """
        config = model_config(model)
        positions = require_positions(config, prompt_ids, max_new_tokens)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # as for Ray: nothing about usage is uploaded
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"evaluate.engine=vllm: cannot be imported ({first_line(error)}); pip install 'bdpo[vllm]'"
            ) from None
        self.chat = chat
        self.stops = stop_ids(shipped_generation_config(model_folder(model), config), chat)
        self.sampling_params = SamplingParams
        self.llm = LLM(**engine_settings(model, positions, gpus))

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        max_new_tokens: int,
        *,
        prefills: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """See `bdpo.evaluation.engines.base.Generate`."""
        prompt_ids = begun_ids(self.chat, prompts, prefills)
        settings = sampling_settings(prompt_ids, max_new_tokens, self.stops, sampling)
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            [self.sampling_params(**each) for each in settings],
            use_tqdm=False,
        )
        rows = [output.outputs[0].token_ids for output in outputs]
        return [answer(self.chat, ids, self.stops, max_new_tokens) for ids in rows]


def engine_settings(model: ModelConfig, positions: int, gpus: float) -> dict[str, str | bool | float]:
    """Arguments of `vllm.LLM`; `gpus`: a share of one, or a whole number to split the weights over.

    The folder is the snapshot of `model.revision`. `max_model_len` is what is needed and not what the model
    has, which for long contexts no KV cache may hold.
    """
    return {
        "model": str(model_folder(model)),
        "skip_tokenizer_init": True,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "load_format": "safetensors",
        "generation_config": "vllm",  # its own neutral defaults, not the sampling that the model ships
        "max_model_len": positions,
        "tensor_parallel_size": max(1, int(gpus)),
        # left to itself, inside a placement group it would ask Ray for GPUs that this actor holds already
        "distributed_executor_backend": "mp" if gpus > 1 else "uni",
        "gpu_memory_utilization": _MEMORY * min(1.0, gpus),
    }


def sampling_settings(
    prompt_ids: list[list[int]], max_new_tokens: int, stops: set[int], sampling: Sampling | None = None
) -> list[dict[str, Any]]:
    """Arguments of `vllm.SamplingParams` for each prompt; what is not named is neutral by default.

    `ignore_eos`, because vLLM would add a stop of its own: `stops` are all there are.
    """
    seeds = sampling.seeds(prompt_ids) if sampling else [None] * len(prompt_ids)
    return [
        {
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature if sampling else 0.0,
            "seed": seed,
            "stop_token_ids": sorted(stops),
            "ignore_eos": True,
            "detokenize": False,
        }
        for seed in seeds
    ]
