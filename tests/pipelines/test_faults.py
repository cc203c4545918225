"""Which errors end a trial for good, as they come out of Ray's wrapping."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from bdpo.errors import UserError
from pipelines.runtime.faults import in_a_line, own_fault

RESET = ConnectionResetError("the other worker is gone")

NAN = FloatingPointError("the loss is not finite")

GPU_FULL = torch.OutOfMemoryError("CUDA out of memory")


def of_a_task(error: Exception) -> Exception:
    """As Tune gets what an actor raised."""
    return RayTaskError("step", "Traceback ...", error, "ray::TrialActor.step").as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NAN, "FloatingPointError: the loss is not finite"),
        (UserError("train.lora: none fits"), "UserError: train.lora: none fits"),
        (ControllerError(NAN), "FloatingPointError: the loss is not finite"),
        (WorkerGroupError("both", {0: RESET, 1: GPU_FULL}), "OutOfMemoryError: CUDA out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate"),
            "RuntimeError: DefaultCPUAllocator: can't allocate",
        ),
        (
            WorkerGroupError(
                "one", {0: WorkerHealthCheckFailedError("dead", OutOfMemoryError("node is full"))}
            ),
            "OutOfMemoryError: node is full",
        ),
        (of_a_task(GPU_FULL), "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_what_a_trial_would_meet_again_is_its_own(error, said):
    assert in_a_line(own_fault(error)) == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(5, "I/O error"), "OSError: [Errno 5] I/O error"),
        (WorkerGroupError("both", {0: RESET, 1: RESET}), "ConnectionResetError: the other worker is gone"),
        (of_a_task(WorkerGroupError("one", {0: RESET})), "ConnectionResetError: the other worker is gone"),
        (ActorDiedError(), "ActorDiedError: The actor died unexpectedly before finishing this task."),
    ],
)
def test_what_its_machines_did_is_not(error, said):
    assert own_fault(error) is None
    assert in_a_line(error) == said
