"""Compile the Triton kernels for GPUs that need not be present, and print the results as JSON.

This is a separate program because a process can use either Triton's interpreter, as the tests do, or its compiler."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from spartan_ray.noise import cuda
from spartan_ray.noise.contract import RMS
from spartan_ray.vision import fold_cuda

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)


class CompileOnly:
    """A wrapper around a kernel. A launch compiles the kernel but does not run it."""

    def __init__(self, kernel: Any, found: dict[str, Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self.compile, grid=grid)

    def compile(self, *arguments: object, **options: object) -> None:
        kernel = self.kernel.warmup(*arguments, **options)
        self.found[kernel.hash] = kernel


def examined(kernel: Any) -> dict[str, Any]:
    """Return the PTX, the registers and bytes of local memory per thread, and the instructions in the longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], stdout=subprocess.PIPE, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = [0]
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            if (jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
                loops.append(len(instructions) - labels[jump[1]])
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    memory = numbers["STACK"] + numbers["LOCAL"]
    return {"ptx": kernel.asm["ptx"], "registers": numbers["REG"], "local": memory, "loop": max(loops)}


def compiled(architecture: int) -> dict[str, Any]:
    """Return every kernel compiled for an architecture. The key has its name, its noise kind if any, and a number."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
    )
    triton.runtime.driver.set_active(driver)
    found: dict[str, dict[str, Any]] = {}
    theta = torch.zeros(1000)
    # NumPy scalars, as in the arrays of `Members`.
    offset, gain = np.array([0.5, 2.0], np.float32)
    plain = cuda._descend, cuda._accumulate, cuda._descend_from, fold_cuda._fold
    for kind in RMS:
        kernels: dict[str, Any] = {}
        cuda._descend, cuda._accumulate, cuda._descend_from = (CompileOnly(one, kernels) for one in plain[:3])
        kernel = cuda.CudaKernel(kind, theta.device)
        for seed, start in ((1, 0), (16, 1), (2**31, 2**31), (2**64 - 1, 2**40)):
            kernel.descend(theta, theta, seed, offset, gain, theta, start)
            kernel.accumulate(np.array([seed], np.uint64), np.ones(1, np.float32), start, start + 1000)
            kernel.descend(theta, theta, torch.tensor([seed - 2**63]), theta[:1], theta[1:2], theta, start)
        kernel.descend(theta, None, 1, offset, gain, theta)
        kernel.descend(theta, None, torch.tensor([1]), theta[:1], theta[1:2], theta)
        found |= {f"{one.name} {kind} {number}": examined(one) for number, one in enumerate(kernels.values())}
    kernels = {}
    fold_cuda._fold = CompileOnly(plain[3], kernels)
    for dtype in (torch.float32, torch.bfloat16):
        fold_cuda.fold(theta, theta, torch.zeros(2, 4, dtype=torch.int64), theta.to(dtype))
    found |= {f"_fold {number}": examined(one) for number, one in enumerate(kernels.values())}
    cuda._descend, cuda._accumulate, cuda._descend_from, fold_cuda._fold = plain
    for one in plain:
        one.device_caches.clear()
    return found


if __name__ == "__main__":
    print(json.dumps({architecture: compiled(architecture) for architecture in ARCHITECTURES}))
