"""Elastic training: the number of workers follows the cluster, within `train.workers: [min, max]`.

Ray Train starts as many workers as the cluster holds, and fewer when a node has gone. It also looks whether
the cluster holds more while they work, every minute by default, and then ends them wherever they are. Here it
looks when a checkpoint has been committed, so that nothing but the next step is begun in vain.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)


class CheckpointScalingPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, which considers another number of running workers after each checkpoint alone."""

    def __init__(self, scaling_config: Any) -> None:
        super().__init__(scaling_config)
        self._group_start: float | None = None
        self._reported: Counter[int] = Counter()
        self._committed = 0

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Resize if the last worker's part of a checkpoint has just been committed, and room has changed."""
        if worker_group_state.start_time != self._group_start:
            self._group_start, self._committed = worker_group_state.start_time, 0
            self._reported = Counter(dict.fromkeys(worker_group_status.worker_statuses, 0))
        for rank, worker in worker_group_status.worker_statuses.items():
            report = worker.training_report
            self._reported[rank] += report is not None and report.checkpoint is not None
        committed = min(self._reported.values())
        if committed == self._committed:
            self._maybe_send_resource_request()  # which expires otherwise
            return NoopDecision()
        self._committed = committed
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)


class ElasticTrainer(TorchTrainer):
    """Ray's trainer with `CheckpointScalingPolicy`."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = CheckpointScalingPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(  # type: ignore[misc]
            **{**arguments, "scaling_policy": policy}
        )
