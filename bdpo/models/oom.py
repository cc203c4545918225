"""Recognising that a GPU or the host has run out of memory."""

from __future__ import annotations

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU, where torch has no class for it."""
    signs = ("DefaultCPUAllocator", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
    message = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in message for sign in signs)
