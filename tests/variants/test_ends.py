"""The record of a variant that has no result."""

from __future__ import annotations

import pytest

from bdpo.errors import UserError
from bdpo.variants.ends import Cause, End, Failure, forget_failure, read_failure, write_failure

LOST = Failure(End.LOST, "3 times, at last OSError: gone")


def test_a_failure_is_read_as_it_was_written_and_is_none_of_another_fingerprint(tmp_path):
    assert read_failure(tmp_path) is None
    write_failure(tmp_path, {"seed": 0}, LOST)
    assert read_failure(tmp_path) == read_failure(tmp_path, {"seed": 0}) == LOST
    assert read_failure(tmp_path, {"seed": 1}) is None
    forget_failure(tmp_path)
    assert read_failure(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "cause", "retried"),
    [
        (FloatingPointError("the loss is not finite"), Cause.NOT_FINITE, False),
        (UserError("train.lora: none fits"), Cause.USER, True),
        (MemoryError("out of memory"), Cause.OTHER, True),
    ],
)
def test_what_may_end_in_another_way_is_retried(tmp_path, error, cause, retried):
    write_failure(tmp_path, {}, Failure(End.FAILED, "a line", Cause.of(error)))
    failure = read_failure(tmp_path)
    assert (failure.cause, failure.retried) == (cause, retried)
