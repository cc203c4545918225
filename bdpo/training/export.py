"""Writing the trained model, and the proof that what is written is what was trained."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bdpo.models.adapters import export_merged
from bdpo.models.loading import load_model
from bdpo.models.logps import ROUNDING, LogpsModel
from bdpo.storage.cache import local_copy
from bdpo.storage.checksums import write_checksums
from bdpo.storage.paths import atomic_folder
from bdpo.storage.run_dir import RunDir
from bdpo.training.engine import export
from bdpo.training.pairs import TrainingPairs

log = logging.getLogger(__name__)

PROBES = 4  # pairs, the shortest: the exported model is tried on the CPU


def export_model(engine: Any, data: TrainingPairs, run: RunDir, probe: bool = True) -> None:
    """Write the model, complete or not at all; the first worker writes, the others give it their parts.

    Of a model with LoRA the adapter comes first, and the base with it merged in is made from that. Before
    a model takes its place it is loaded as anybody will load it, on the CPU of the first worker, and must
    give the log-probs of the engine on a few pairs. All workers wait meanwhile, so a training of several
    rungs proves its first export and its last: `probe` is False for those between, which the same code makes.

    Raises:
        RuntimeError: the exported model gives other log-probs.
    """
    first, lora = dist.get_rank() == 0, data.config.train.lora is not None
    probes = _shortest(data) if probe else []
    trained = _probe(engine, data, probes) if probe else torch.empty(0)
    with atomic_folder(run.adapter if lora else run.model) if first else nullcontext(Path()) as folder:
        export(engine, data.chat, folder)
        if probe and first and not lora:
            _require_same(trained, folder, data, probes)
        if first:
            write_checksums(folder)
    if lora and first:
        with atomic_folder(run.model) as folder:
            export_merged(data.config.model, local_copy(run.adapter), data.chat, folder)
            if probe:
                _require_same(trained, folder, data, probes)
            write_checksums(folder)


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


def _require_same(trained: torch.Tensor, folder: Path, data: TrainingPairs, probes: list[int]) -> None:
    config, begun = data.config, time.perf_counter()
    exported = LogpsModel(load_model(folder, config.model).eval(), config.data.max_length)
    distance = float((_probe(exported, data, probes) - trained).abs().max())
    seconds = time.perf_counter() - begun
    log.info("exported model: log-probs within %.2g nats per root token, in %.1f s", distance, seconds)
    if not distance <= ROUNDING[config.model.dtype]:
        raise RuntimeError(
            f"the exported model is not the trained one: log-probs of {data.names(probes)} are up to "
            f"{distance:.3g} nats per root token apart; nothing was exported"
        )
