"""What holds for a whole process: set once, where it starts, and by nothing that is made later in it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any, Literal

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
    # All memory is written before it is read; to fill it first would be one launch more for each `empty`.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    for products in _products():
        products.fp32_precision = "ieee"
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
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with threads(count), torch.autocast(device.type, enabled=False), float32_products("ieee"):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _products() -> tuple[Any, ...]:
    """What multiplies float32 on a GPU. `allow_tf32`, the older setting of the same, cannot be read where one of these
    was set."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


@contextlib.contextmanager
def float32_products(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    """A GPU multiplies float32 as it is, or in TF32: with 10 bits of mantissa instead of 23, several times as fast."""
    before = [products.fp32_precision for products in _products()]
    try:
        for products in _products():
            products.fp32_precision = kind
        yield
    finally:
        for products, was in zip(_products(), before, strict=True):
            products.fp32_precision = was


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
