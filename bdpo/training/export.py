"""Writing the trained model, and the proof that what is written is what was trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bdpo.models.adapters import export_merged, exported_adapter
from bdpo.models.loading import load_model
from bdpo.models.logps import ROUNDING, LogpsModel
from bdpo.models.weight_files import some_names
from bdpo.storage.cache import local_copy
from bdpo.storage.checksums import write_checksums
from bdpo.storage.paths import atomic_folder
from bdpo.storage.run_dir import RunDir
from bdpo.training.engine import export, trained_parameters
from bdpo.training.pairs import TrainingPairs

log = logging.getLogger(__name__)

PROBES = 4  # pairs, the shortest: the exported model is tried on the CPU


def export_model(engine: Any, data: TrainingPairs, run: RunDir, probe: bool = True) -> None:
    """Write the model, complete or not at all; the first worker writes, the others give it their parts.

    Of a model with LoRA the adapter comes first, and the base with it merged in is made from that. Before
    a model takes its place it is loaded as anybody will load it, on the CPU of the first worker. Its weights
    must be those of the engine, to the bit: in bfloat16 a model that a small learning rate has trained is as
    near to its base, in what it computes, as rounding takes it. Of LoRA the adapter must be the engine's, and
    the merged model the one that was merged, which `load_adapted` has compared with PEFT. That the weights
    are put to the same use is what the log-probs of a few pairs show, to rounding.

    All workers wait meanwhile, so a training of several rungs proves its first export and its last: `probe`
    is False for those between, which the same code makes.

    Raises:
        RuntimeError: the exported model has other weights or gives other log-probs.
    """
    first, lora = dist.get_rank() == 0, data.config.train.lora is not None
    probes = _shortest(data) if probe else []
    trained = _probe(engine, data, probes) if probe else torch.empty(0)
    with atomic_folder(run.adapter if lora else run.model) if first else nullcontext(Path()) as folder:
        export(engine, data.chat, folder)
        exported = load_model(folder, data.config.model) if probe and first and not lora else None
        if probe:
            written = _parameters(exported) if exported else exported_adapter(folder) if first else None
            _require_equal(trained_parameters(engine), written, data)
        if exported:
            _require_same(trained, exported, data, probes)
        if first:
            write_checksums(folder)
    if lora and first:
        with atomic_folder(run.model) as folder:
            merged = export_merged(data.config.model, local_copy(run.adapter), data.chat, folder)
            if probe:
                exported = load_model(folder, data.config.model)
                _require_equal(merged.named_parameters(), _parameters(exported), data)
                _require_same(trained, exported, data, probes)
            write_checksums(folder)


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def _require_equal(
    trained: Iterable[tuple[str, torch.Tensor]],
    written: Mapping[str, torch.Tensor] | None,
    data: TrainingPairs,
) -> None:
    """Go through the trained weights; the worker that has what is `written` compares them."""
    dtype = getattr(torch, data.config.model.dtype)  # some architectures load a few weights in float32
    apart = [
        name
        for name, values in trained
        if written is not None and not _equal(values, written.get(name), dtype)
    ]
    if apart:
        raise RuntimeError(
            f"the exported model is not the trained one: {len(apart)} tensors have other values "
            f"({some_names(apart)}); nothing was exported"
        )


def _equal(values: torch.Tensor, written: torch.Tensor | None, dtype: torch.dtype) -> bool:
    return written is not None and torch.equal(values.to("cpu", dtype), written.to(dtype))


def _shortest(data: TrainingPairs) -> list[int]:
    shortest: list[int] = np.argsort(data.lengths, kind="stable")[:PROBES].tolist()
    return shortest


def _probe(model: Any, data: TrainingPairs, indices: list[int]) -> torch.Tensor:
    """Log-probs of the responses that the method looks at, over the root of their tokens: on the CPU, one
    dimension. Every worker must call this."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logps = data.packed(indices).logps(model)
    model.train(training)
    scaled = [
        getattr(logps, f"policy_{side}") / getattr(logps, f"{side}_tokens").sqrt()
        for side in data.config.method.responses
    ]
    return torch.cat(scaled).double().cpu()


def _require_same(trained: torch.Tensor, exported: Any, data: TrainingPairs, probes: list[int]) -> None:
    config, begun = data.config, time.perf_counter()
    computed = _probe(LogpsModel(exported.eval(), config.data.max_length), data, probes)
    distance, seconds = float((computed - trained).abs().max()), time.perf_counter() - begun
    log.info(
        "exported model: the trained weights; log-probs of responses, over the root of their tokens, within "
        "%.2g nats, in %.1f s",
        distance,
        seconds,
    )
    if not distance <= ROUNDING[config.model.dtype]:
        raise RuntimeError(
            f"the exported model is not the trained one: log-probs of {data.names(probes)}, over the root of "
            f"their responses' tokens, differ by up to {distance:.3g} nats, more than the "
            f"{ROUNDING[config.model.dtype]:g} that {config.model.dtype} explains; nothing was exported"
        )
