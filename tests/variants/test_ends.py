"""The record of a variant that has no result."""

from __future__ import annotations

import pytest

from bdpo.errors import UserError
from bdpo.variants.ends import End, Failure, forget_failure, read_failure, write_failure

LOST = Failure(End.LOST, "3 times, at last OSError: gone")


def test_a_failure_is_read_as_it_was_written_and_is_none_of_another_fingerprint(tmp_path):
    assert read_failure(tmp_path) is None
    write_failure(tmp_path, {"seed": 0}, LOST)
    assert read_failure(tmp_path) == read_failure(tmp_path, {"seed": 0}) == LOST
    assert read_failure(tmp_path, {"seed": 1}) is None
    forget_failure(tmp_path)
    assert read_failure(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "diverged", "is_for_user"),
    [
        ("FloatingPointError: the loss is not finite", True, False),
        (f"{UserError.__name__}: train.lora: none fits", False, True),
        ("OutOfMemoryError: CUDA out of memory", False, False),
    ],
)
def test_the_class_of_the_error_says_who_can_mend_it(error, diverged, is_for_user):
    failure = Failure(End.FAILED, error)
    assert (failure.diverged, failure.is_for_user) == (diverged, is_for_user)
    assert failure.message == error.partition(": ")[2]
