"""Checkpoints are written beside the training, which waits for nothing but a copy of its state.

When a checkpoint is due, each worker copies its part of the state to host memory. A thread writes the copy
to a local folder and hashes what it writes. At the end of each step the workers tell each other whether they
have written their parts; when all have, they report the folder, and the launcher copies it to storage. A
worker that is killed on the way leaves a folder behind, which the next process of the same run and rank
removes.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from bdpo.config import TrainConfig
from bdpo.errors import UserError
from bdpo.models.deepspeed_internals import checkpoint_states
from bdpo.storage.digests import sha256
from bdpo.storage.paths import write_text
from bdpo.storage.run_dir import RunDir
from bdpo.training.checkpoints import CheckpointPart, TrainProgress
from bdpo.training.launcher import Launcher, Metrics, Phase
from bdpo.training.resharding import STATE


class Staging:
    """Local folders in which this worker's parts are written before they are copied to storage.

    A killed process cannot remove its own folders, so the next process of the same run and rank does.
    """

    def __init__(self, run: RunDir) -> None:
        run_digest = hashlib.sha256(str(run.root).encode()).hexdigest()[:16]
        self.prefix = f"bdpo-{run_digest}-{dist.get_rank()}-"
        for left_over in Path(tempfile.gettempdir()).glob(f"{self.prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def new(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(prefix=self.prefix))


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that a thread writes to a folder."""

    folder: Path
    progress: TrainProgress
    metrics: Metrics
    future: Future[None]


class CheckpointSaver:
    """Saves the state of an engine, one checkpoint at a time; every worker must call each method.

    As a context manager it waits at the end for what is being written, and removes what was not reported.
    """

    def __init__(self, engine: Any, run: RunDir, train: TrainConfig, launcher: Launcher) -> None:
        self.engine, self.train, self.launcher = engine, train, launcher
        self.staging, self.copies = Staging(run), HostCopies()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: _Writing | None = None
        self.saved = time.monotonic()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, *raised: object) -> None:
        self.thread.shutdown()
        if self.writing:
            shutil.rmtree(self.writing.folder, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Report what all workers have written by now; whether a checkpoint is to be saved after this step.

        Raises:
            UserError: a part could not be written.
        """
        minutes = self._report_written() / 60
        steps, limit = self.train.save_steps, self.train.minutes_between_saves
        return bool(steps and step % steps == 0) or (limit is not None and minutes >= limit)

    def save(self, progress: TrainProgress, metrics: Metrics, further: Mapping[str, Any]) -> None:
        """Copy this worker's part of the engine's state, and begin to write it; `further` is saved with it.

        Raises:
            UserError: a part, of this checkpoint or of the one before, could not be written.
        """
        self.finish()
        self.launcher.begins(Phase.CHECKPOINT)
        folder = self.staging.new()
        try:
            states = checkpoint_states(self.engine, folder, STATE, self.copies.copy, further)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise _unwritten(progress) from error
        future = self.thread.submit(_write, folder, states, progress, metrics)
        self.writing, self.saved = _Writing(folder, progress, metrics, future), time.monotonic()

    def finish(self) -> None:
        """Wait until all workers have written what was begun and everything that was reported is committed.

        Raises:
            UserError: a part could not be written.
        """
        self.launcher.begins(Phase.WRITING)
        if self.writing:
            self.writing.future.exception()
            self._report_written()
        self.launcher.reported()  # at most one checkpoint is on its way to storage

    def _report_written(self) -> float:
        """Report the checkpoint if every worker has written its part; returns seconds since the last copy.

        A checkpoint of which one worker failed to write its part is reported by none, and all of them stop.
        """
        writing = self.writing
        ended = writing is None or writing.future.done()
        error = writing.future.exception() if writing and ended else None
        mine = [time.monotonic() - self.saved, not ended, error is not None]
        seconds, unwritten, failed = _greatest(mine, self.engine.device)
        if writing and failed:
            raise (error or _unwritten(writing.progress))
        if writing and not unwritten:
            self.writing = None
            self.launcher.report(writing.folder, writing.metrics)
        return seconds


class HostCopies:
    """Copies of states in host memory, which the next state of the same name uses again.

    A state is what DeepSpeed saves: tensors in nested dicts and lists, and small things beside them. Tensors
    that are the same memory (tied weights) are copied once. On a machine with a GPU the memory is pinned.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, name: str, state: Any) -> Any:
        """A copy of the state that shares nothing with it, its tensors on the CPU."""
        copies: dict[tuple[object, ...], torch.Tensor] = {}
        memo: dict[int, Any] = {}  # what `deepcopy` takes for an object, by its id
        for tensor in _tensors(state):
            memory = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if memory not in copies:
                copies[memory] = self._buffer((name, len(copies)), tensor)
                copies[memory].copy_(tensor.detach(), non_blocking=True)
            memo[id(tensor)] = copies[memory]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy.deepcopy(state, memo)

    def _buffer(self, place: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self.buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            pinned = torch.cuda.is_available()
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self.buffers[place] = buffer
        return buffer


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


class _Hashed:
    """A file that knows the size and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Write and count."""
        self.sha256.update(content)
        self.size += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        """What torch.save calls at the end."""
        self.file.flush()


def _write(folder: Path, states: dict[Path, Any], progress: TrainProgress, metrics: Metrics) -> None:
    """Write this worker's part of a checkpoint; what DeepSpeed wrote itself is hashed where it lies."""
    files = {}
    try:
        for path, state in states.items():
            with path.open("wb") as file:
                hashed = _Hashed(file)
                torch.save(state, hashed)  # type: ignore[arg-type]  # it calls no other methods
            files[_name(path, folder)] = {"size": hashed.size, "sha256": hashed.sha256.hexdigest()}
        others = sorted(file for file in folder.rglob("*") if file.is_file() and file not in states)
        files |= {
            _name(path, folder): {"size": path.stat().st_size, "sha256": sha256(path)} for path in others
        }
        part = CheckpointPart(dist.get_world_size(), progress, metrics, files)
        write_text(folder / f"part-{dist.get_rank()}.json", part.to_json())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        # torch.save reports a full disk as RuntimeError("[enforce fail at inline_container.cc:672]").
        if isinstance(error, OSError) or "inline_container" in str(error):
            raise _unwritten(progress) from error
        raise


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _unwritten(progress: TrainProgress) -> UserError:
    return UserError(
        f"{tempfile.gettempdir()}: the checkpoint of step {progress.step} cannot be written (is the disk "
        "full?); make room or set TMPDIR, and the same command resumes from the previous checkpoint"
    )


def _greatest(values: list[float], device: torch.device) -> list[float]:
    """Of each value the greatest of all workers."""
    greatest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.tolist()
