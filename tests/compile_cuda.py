"""Compiles the Triton kernels for a GPU that need not be there and prints their PTX. In a process of its own,
since the interpreter of the tests and the compiler exclude each other."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from spartan_ray.noise import cuda
from spartan_ray.noise.contract import RMS

compiled: dict[str, str] = {}


class CompileOnly:
    """Stands for a kernel: a launch compiles it and no more."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self.compile, grid=grid)

    def compile(self, *arguments: object, **options: object) -> None:
        kernel = self.kernel.warmup(*arguments, **options)
        compiled[kernel.hash] = kernel.asm["ptx"]


def main() -> None:
    target = GPUTarget("cuda", 80, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(driver)
    cuda._descend, cuda._accumulate = CompileOnly(cuda._descend), CompileOnly(cuda._accumulate)
    theta = torch.zeros(1000)
    # As they come from the arrays of `Members`.
    offset, gain = np.array([0.5, 2.0], np.float32)
    for kind in RMS:
        kernel = cuda.CudaKernel(kind, theta.device)
        for seed, start in ((1, 0), (16, 1), (2**31, 2**31), (2**64 - 1, 2**40)):
            kernel.descend(theta, theta, seed, offset, gain, theta, start)
            kernel.accumulate(np.array([seed], np.uint64), np.ones(1, np.float32), start, start + 1000)
    print("\n".join(compiled.values()))


if __name__ == "__main__":
    main()
