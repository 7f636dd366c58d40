"""Tests of BatchNorm folding: the kernels against torch, and the number of operations per member."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spartan_ray.engine.evaluator import Evaluator, ParentState
from spartan_ray.engine.strategies.requests import noisy
from spartan_ray.vision import fold_cpu
from spartan_ray.vision.classification import Classification
from spartan_ray.vision.data import Images
from spartan_ray.vision.fold import Fold, fold_for, portable_fold
from spartan_ray.vision.layers import LiveConv2d
from spartan_ray.vision.resnet import ResNet18

CPU = torch.device("cpu")
FOLDS: dict[str, Fold] = {"cpu": fold_cpu.fold, "portable": portable_fold}
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # This kernel runs in Triton's interpreter.
    from spartan_ray.vision import fold_cuda

    FOLDS["cuda"] = fold_cuda.fold
DTYPES = (torch.float32, torch.bfloat16)
# Triton's interpreter truncates to bfloat16, where a GPU rounds.
KERNELS = [(name, dtype) for name in FOLDS for dtype in DTYPES if (name, dtype) != ("cuda", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(8, 3, 1, 1), (4, 3, 2, 1), (2, 3, 1, 1), (2, 3, 2, 1), (1, 3, 1, 1), (2, 1, 2, 0), (3, 5, 2, 2), (1, 1, 1, 0)],
)  # fmt: skip
def test_runs_of_weights_make_the_arranged_weight_times_the_gain(
    size: int, kernel: int, stride: int, padding: int, name: str, dtype: torch.dtype
) -> None:
    """The weight lies in the middle of a larger memory. Nothing is written outside the range of the output."""
    conv = LiveConv2d(5, 6, kernel, stride, padding, bias=False)
    count = conv.weight.numel()
    memory_S = torch.randn(count + 13)
    conv.weight.data = memory_S[7 : 7 + count].view(6, kernel, kernel, 5).permute(0, 3, 1, 2)
    gain_C, sizes = torch.randn(9), torch.Size((size, size))
    shape, run_G4 = conv.runs(sizes)
    out_F = torch.zeros(shape.numel() + 4, dtype=dtype)
    FOLDS[name](memory_S, gain_C, torch.from_numpy(run_G4 + np.array([7, 3, 0, 2])), out_F)
    with torch.no_grad():
        arranged = conv.arranged(sizes)[0]
    expected = arranged.permute(0, 2, 3, 1) if arranged.dim() == 4 else arranged
    gain_O = gain_C[2:8].repeat(len(expected) // 6).view(-1, *[1] * (expected.dim() - 1))
    assert torch.equal(out_F[3:-1].view(shape), (expected * gain_O).to(dtype))
    assert not out_F[[0, 1, 2, -1]].any()


@pytest.mark.parametrize("name", [name for name, dtype in KERNELS if dtype == torch.bfloat16])
def test_every_kernel_rounds_to_half_as_torch_does(name: str) -> None:
    """Values are rounded to nearest, ties to even, including subnormal and infinite values. NaN stays NaN."""
    bits_S = np.arange(0, 2**32, 65_521, dtype=np.uint32)
    ties_S = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    not_numbers_S = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)
    weight_S = torch.from_numpy(np.concatenate([bits_S, ties_S, not_numbers_S]).view(np.float32))
    out_F = torch.zeros(len(weight_S), dtype=torch.bfloat16)
    FOLDS[name](weight_S, torch.ones(1), torch.tensor([[0, 0, len(weight_S), 0]]), out_F)
    expected_F = weight_S.to(torch.bfloat16)
    assert torch.equal(out_F.isnan(), expected_F.isnan())
    assert torch.equal(out_F[~out_F.isnan()], expected_F[~out_F.isnan()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_folds_as_a_cpu_does(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    fold = fold_for(device)
    assert fold is not portable_fold
    weight_S, gain_C = torch.randn(100_000), torch.randn(7)
    first_G = torch.randperm(90_000)[:500]
    run_G4 = torch.stack([first_G, torch.arange(500) * 5000, torch.arange(500) * 9, torch.arange(500) % 7], 1)
    expected_F, out_F = (torch.zeros(2_500_000, dtype=dtype, device=where) for where in (CPU, device))
    fold_cpu.fold(weight_S, gain_C, run_G4, expected_F)
    fold(weight_S.to(device), gain_C.to(device), run_G4.to(device), out_F)
    assert torch.equal(out_F.cpu(), expected_F)


class Operations(TorchDispatchMode):
    """A mode that counts the operations that compute or copy something. On a GPU, each takes at least one launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Sequence[Any] = (), named: Any = None) -> Any:
        named = named or {}
        if operation is not torch.ops.aten.to.dtype:  # it decomposes into operations that read its arguments
            with self:
                result = operation.decompose(*arguments, **named)
            if result is not NotImplemented:
                return result
        result = operation(*arguments, **named)
        given = [*arguments, *named.values()]
        given += [item for value in given if isinstance(value, list | tuple) for item in value]
        known = {value.untyped_storage()._cdata for value in given if isinstance(value, torch.Tensor)}
        results = result if isinstance(result, list | tuple) else [result]
        fresh = any(isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in known for one in results)
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in operation._schema.arguments)
        nothing = any(name in str(operation) for name in ("empty", "as_strided"))
        self.count += int((fresh or writes) and not nothing)
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_member_is_few_operations(precision: Literal["fp32", "bf16"]) -> None:
    """The counts leave out two operations that dispatch does not show: descend and fold."""
    pixels_NHWC, labels_N = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8), torch.arange(64) % 10
    images = Images(pixels_NHWC, labels_N)
    fitness = Classification(images, images[slice(0, 8)], (0.5,) * 3, (0.25,) * 3, precision=precision)
    evaluator = Evaluator(ResNet18(10, "imagenet", 16), fitness, "uniform", CPU)
    fitness.batch = 8
    theta_D, buffers = evaluator.model.theta_D.numpy().copy(), [each.numpy().copy() for each in evaluator.model.buffers]
    evaluator.load(ParentState(theta_D, buffers, {"fitness": np.arange(64), "search": np.arange(8)}))

    def counted(members: int, cases: Literal["fitness", "search"]) -> int:
        population = noisy(np.arange(members, dtype=np.uint64), 0.0, 0.01)
        evaluator.evaluate(population, cases, -math.inf)
        with Operations() as operations:
            evaluator.evaluate(population, cases, -math.inf)
        count: int = operations.count
        return count

    one, two, eight_batches = counted(1, "search"), counted(2, "search"), counted(1, "fitness")
    batch = (eight_batches - one) / 7
    assert batch <= 60
    assert two - one - batch <= 10
