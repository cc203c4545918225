"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow (`train.report_to`).

All are fed from that file, by one process, so none knows a step that the file does not. Keys and servers
come from the environment alone (WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI); what is sent are numbers,
no config and no text.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from bdpo.config import Config
from bdpo.errors import UserError, first_line
from bdpo.storage.metrics_log import MetricsLog
from bdpo.storage.paths import atomic_folder, discard, read_text, write_text
from bdpo.storage.run_dir import RunDir

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place that metrics go to."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a step; what it already has of the step is not added again."""

    def close(self) -> None:
        """Send what is still on its way."""


class _TensorBoard:
    """Event files under <run_dir>/train/tensorboard, written anew by each command that trains.

    On object storage they appear when the command ends.
    """

    def __init__(self, run: RunDir) -> None:
        from tensorboardX import SummaryWriter

        self.place, folder = ExitStack(), run.train / "tensorboard"
        discard(folder)
        if not isinstance(folder, Path):
            folder = self.place.enter_context(atomic_folder(folder))
        self.writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
        self.place.close()


class _WandB:
    """A run of Weights & Biases that a second command continues; it drops steps it already has."""

    def __init__(self, run: RunDir) -> None:
        import wandb

        number = _remembered(run, "wandb", lambda: uuid.uuid4().hex)
        folder = run.train if isinstance(run.train, Path) else Path(tempfile.mkdtemp(prefix="bdpo-wandb-"))
        settings = wandb.Settings(console="off", silent=True, x_disable_meta=True, x_save_requirements=False)
        self.run = wandb.init(dir=folder, name=run.root.name, id=number, resume="allow", settings=settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.run.step:
            self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """A run of MLflow that a second command continues."""

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

        self.run_id = _remembered(run, "mlflow", create)
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
    """Follows a run's metrics.jsonl and hands each new line to the trackers of `train.report_to`.

    Raises:
        UserError: a tracker cannot be started; said before any training.
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
        """Report what the file has that was not reported yet; returns all its lines.

        A worker that resumes takes lines back and writes them once more, the same: those are skipped.
        """
        rows = self.metrics.read()
        for row in rows[self.seen :]:
            self._each(methodcaller("log", int(row["step"]), _numbers(row)))
        self.seen = max(self.seen, len(rows))
        return rows

    def close(self) -> None:
        """Report the last lines and end."""
        self.follow()
        self._each(methodcaller("close"))

    def _each(self, do: Callable[[Tracker], object]) -> None:
        """A tracker that fails is left out and said so: metrics.jsonl has all, the training goes on."""
        for name, tracker in list(self.trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # every library has its own
                del self.trackers[name]
                log.warning("%s failed and gets no more metrics (%s)", name, first_line(error))


def _remembered(run: RunDir, name: str, create: Callable[[], str]) -> str:
    """What a run is called there; forgotten with all else of the training by fresh=true."""
    file = run.train / f"{name}.id"
    if not file.exists():
        write_text(file, create())
    return read_text(file)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}
