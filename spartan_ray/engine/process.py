"""Settings of a process that affect the speed and the bits of its results.

`set_up` makes them once, when the process starts. The context managers change some of them for a block.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any, Literal

import numba
import torch
from llvmlite import binding as llvm

# Constants of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def set_up(threads: int | None = None, gpu: bool = False) -> torch.device:
    """Set up this process to compute fast and reproducibly.

    Args:
        threads: CPU threads of torch. None leaves torch's setting unchanged.
        gpu: Also select deterministic algorithms on GPUs, and compute on the first visible one.

    Returns:
        The device: the first visible GPU with `gpu`, else the CPU.
    """
    if threads:
        torch.set_num_threads(threads)
    _keep_freed_memory()
    _use_whole_vectors()
    if not gpu:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # All memory is written before it is read. Filling it first would cost one more launch per `empty`.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    for products in _products():
        products.fp32_precision = "ieee"
    return torch.device("cuda", 0)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set the number of CPU threads of torch for a block. None leaves it. The bits of results depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def as_in_a_worker(count: int | None, device: torch.device) -> Iterator[None]:
    """Compute with the settings of a worker for a block, whatever this process has set.

    They are `count` threads, no autocast, no TF32, and deterministic cuDNN algorithms."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with threads(count), torch.autocast(device.type, enabled=False), float32_products("ieee"):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _products() -> tuple[Any, ...]:
    """Return the backends that multiply float32 on a GPU, each with a setting `fp32_precision`.

    The older setting `allow_tf32` cannot be read once one of these was set."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


@contextlib.contextmanager
def float32_products(kind: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set how a GPU multiplies float32 for a block.

    "ieee" uses all 23 bits of the mantissa. "tf32" uses 10, and is several times faster."""
    before = [products.fp32_precision for products in _products()]
    try:
        for products in _products():
            products.fp32_precision = kind
        yield
    finally:
        for products, was in zip(_products(), before, strict=True):
            products.fp32_precision = was


def _keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory.

    By default it returns larger activations to the system, which zeroes each page again for the next batch. That takes
    a twentieth of a forward pass."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _use_whole_vectors() -> None:
    """Make numba use the full vector width of processors with AVX-512.

    LLVM uses half of it by default. The full width makes the update 1.7 times as fast. Must be called before numba
    compiles anything."""
    compiler: Any = numba.config
    features = llvm.get_host_cpu_features()
    if compiler.CPU_FEATURES is None and compiler.CPU_NAME is None and features.get("avx512f"):
        compiler.CPU_NAME = llvm.get_host_cpu_name()
        compiler.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"
