"""What holds for a whole process: set once, where it starts, and by nothing that is made later in it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import numba
import torch
from llvmlite import binding as llvm

# Numbers of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def set_up(threads: int | None = None, gpu: bool = False) -> torch.device:
    """Set this process up to compute fast and the same again: torch's threads, the allocator, numba's vectors, and
    for a GPU deterministic algorithms. Returns its device: the first GPU that it sees, or the CPU."""
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    _use_whole_vectors()
    if not gpu:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with so many threads, None as it is: its bits depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def as_in_a_worker(count: int | None, device: torch.device) -> Iterator[None]:
    """Compute as a process of its own would, whatever is set in this one: no autocast, so many threads, no TF32."""
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with threads(count), torch.autocast(device.type, enabled=False), exact:
        yield


def _keep_freed_memory() -> None:
    """Let the allocator of glibc keep what is freed. By default it gives the larger activations back to the system and
    has each page zeroed again in the next batch: a twentieth of a forward pass."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _use_whole_vectors() -> None:
    """LLVM's choice on processors with AVX-512 is half of their width; the whole one makes the update 1.7 times as
    fast. It has to be said before numba compiles anything."""
    compiler: Any = numba.config
    features = llvm.get_host_cpu_features()
    if compiler.CPU_FEATURES is None and compiler.CPU_NAME is None and features.get("avx512f"):
        compiler.CPU_NAME = llvm.get_host_cpu_name()
        compiler.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"
