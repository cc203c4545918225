"""Trackers beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow (`train.report_to`).

One process reads that file and passes its rows on, so no tracker has a step that the file lacks. Keys and
servers come from the environment alone (WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI). Only numbers are
sent, no config and no text.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from bdpo.config import Config
from bdpo.errors import UserError, first_line
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import atomic_folder, discard, read_text, write_text
from bdpo.storage.run_dir import RunDir

log = logging.getLogger(__name__)

TRACKER_SECONDS = 120.0
"""How long a tracker may take for one call; its library may try again for as long as it likes."""


class Tracker(Protocol):
    """A receiver of metrics."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step, except those that the tracker already has."""

    def close(self) -> None:
        """Send everything that is still buffered."""


class _TensorBoard:
    """Event files in <run_dir>/train/tensorboard, which each command that trains writes anew.

    On object storage they appear when the command ends.
    """

    def __init__(self, run: RunDir) -> None:
        from tensorboardX import SummaryWriter

        self.upload, folder = ExitStack(), run.train / "tensorboard"
        discard(folder)
        if not isinstance(folder, Path):
            folder = self.upload.enter_context(atomic_folder(folder))
        self.writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
        self.upload.close()


class _WandB:
    """A run of Weights & Biases, which a later command continues; steps that it has already are dropped."""

    def __init__(self, run: RunDir) -> None:
        import wandb

        run_id = _run_id(run, "wandb", lambda: uuid.uuid4().hex)
        folder = run.train if isinstance(run.train, Path) else Path(tempfile.mkdtemp(prefix="bdpo-wandb-"))
        settings = wandb.Settings(console="off", silent=True, x_disable_meta=True, x_save_requirements=False)
        self.run = wandb.init(dir=folder, name=run.root.name, id=run_id, resume="allow", settings=settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.run.step:
            self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """A run of MLflow, which a later command continues."""

    def __init__(self, run: RunDir) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        if "MLFLOW_TRACKING_URI" not in os.environ:  # its own default is a database in the working folder
            raise ValueError("set MLFLOW_TRACKING_URI")
        self.metric, self.client = Metric, MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bdpo")

        def create() -> str:
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
            return str(self.client.create_run(number, run_name=run.root.name).info.run_id)

        self.run_id = _run_id(run, "mlflow", create)
        self.last: dict[str, int] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        new = [self.metric(k, v, now, step) for k, v in metrics.items() if step > self._last(k)]
        self.client.log_batch(self.run_id, metrics=new)
        self.last |= {metric.key: step for metric in new}

    def close(self) -> None:
        self.client.set_terminated(self.run_id)

    def _last(self, name: str) -> int:
        if name not in self.last:
            history = self.client.get_metric_history(self.run_id, name)
            self.last[name] = max((point.step for point in history), default=-1)
        return self.last[name]


TRACKERS: dict[str, Callable[[RunDir], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


class Tracking:
    """Follows the metrics.jsonl of a run and passes each new row to the trackers of `train.report_to`.

    Raises:
        UserError: a tracker cannot be started; raised before any training.
    """

    def __init__(self, config: Config, run: RunDir) -> None:
        self.metrics, self.seen = MetricsLog(run.metrics), 0
        self.trackers: dict[str, Tracker] = {}
        for name in config.train.report_to:
            try:
                self.trackers[name] = TRACKERS[name](run)
            except ImportError as error:
                raise UserError(
                    f"train.report_to: {name} cannot be imported ({first_line(error)}); "
                    "python -m pip install 'bdpo[tracking]'"
                ) from None
            except Exception as error:  # every library has its own
                raise UserError(f"train.report_to: {name} cannot be started ({first_line(error)})") from None

    def follow(self) -> Sequence[dict[str, float]]:
        """Report the rows that were not reported yet; returns all rows of the file.

        A worker that resumes from a checkpoint removes the later rows and writes the same rows again: these
        are skipped.
        """
        rows = self.metrics.read()
        for row in rows[self.seen :]:
            self._each(methodcaller("log", int(row["step"]), _numbers(row)))
        self.seen = max(self.seen, len(rows))
        return rows

    def close(self) -> None:
        """Report the last rows and close the trackers."""
        self.follow()
        self._each(methodcaller("close"))

    def _each(self, do: Callable[[Tracker], object]) -> None:
        """A tracker that fails is dropped with a warning; the training continues and logs all metrics."""
        for name, tracker in list(self.trackers.items()):
            try:
                _within(TRACKER_SECONDS, partial(do, tracker))
            except (Exception, SystemExit) as error:  # every library has its own
                del self.trackers[name]
                log.warning("%s failed and gets no more metrics (%s)", name, first_line(error))


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Call in a thread that is left behind if it takes longer than that.

    Raises:
        TimeoutError: it does.
    """
    done: Future[None] = Future()

    def work() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:  # a SystemExit of the library would leave us waiting
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        done.result(seconds)
    except TimeoutError:
        if done.done():  # its own
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _run_id(run: RunDir, name: str, create: Callable[[], str]) -> str:
    """The id of the run at a tracker, kept in the run folder until fresh=true removes the training."""
    file = run.train / f"{name}.id"
    if not file.exists():
        write_text(file, create())
    return read_text(file)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
