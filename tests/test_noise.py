"""Tests of the noise contract: published vectors, an independent generator, slices, and every kernel."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spartan_ray.noise import portable
from spartan_ray.noise.contract import RMS, NoiseKind, member_seeds, noise, philox4x32_10
from spartan_ray.noise.cpu import CpuKernel
from spartan_ray.noise.fingerprint import fingerprint, fingerprint_agrees
from spartan_ray.noise.kernels import Kernel, kernel_for
from spartan_ray.noise.portable import PortableKernel

KINDS: tuple[NoiseKind, ...] = ("uniform", "gaussian", "rademacher")
CPU = torch.device("cpu")
HERE: dict[str, Callable[[NoiseKind], Kernel]] = {"cpu": CpuKernel, "portable": lambda kind: PortableKernel(kind, CPU)}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # This kernel runs in Triton's interpreter.
    from spartan_ray.noise.cuda import CudaKernel

    HERE["cuda"] = lambda kind: CudaKernel(kind, CPU)
KERNELS = {(kind, name): make(kind) for kind in KINDS for name, make in HERE.items()}
# Interpreted Triton kernels are drawn less often, because they take a hundred times as long.
some_kernel = st.sampled_from([which for which in sorted(KERNELS) for _ in range(1 if which[1] == "cuda" else 8)])
seeds = st.integers(0, 2**64 - 1)
factors = st.just(0.0) | st.floats(-10, 10, width=32)


def agree(kind: NoiseKind, computed: torch.Tensor, expected: NDArray[np.float32], atol: float = 1e-6) -> None:
    """Assert that values are equal to the bit, or for gaussian noise within `atol`."""
    if kind == "gaussian":
        np.testing.assert_allclose(computed.numpy(), expected, rtol=0, atol=atol)
    else:
        assert computed.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: tuple[int, int], expected: str) -> None:
    words = philox4x32_10(np.array(counter, np.uint64)[:, None], key)[:, 0]
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@given(seeds)
def test_uniform_is_what_torch_s_stateless_generator_draws(seed: int) -> None:
    key = torch.tensor([seed, 0], dtype=torch.uint64)
    drawn = torch.empty(1001)
    torch.ops.aten._philox_uniform_(drawn, key, -1.0, 1.0)
    assert noise("uniform", seed, 0, 1001).tobytes() == drawn.numpy().tobytes()


@given(seeds, st.integers(0, 2**40), st.integers(1, 10_000), some_kernel)
def test_kernels_compute_the_definition(seed: int, start: int, size: int, which: tuple[NoiseKind, str]) -> None:
    expected = noise(which[0], seed, start, start + size)
    once = np.array([seed], np.uint64), np.ones(1, np.float32)
    agree(which[0], KERNELS[which].accumulate(*once, start, start + size), expected)


@given(seeds, st.lists(st.integers(0, 5000), min_size=2, max_size=5, unique=True), some_kernel)
def test_slices_equal_the_whole(seed: int, cuts: list[int], which: tuple[NoiseKind, str]) -> None:
    kernel, cuts = KERNELS[which], sorted(cuts)
    seed_K = np.array([seed, seed ^ 1, 7], np.uint64)
    weight_K = np.array([0.3, -1.7, 0.01], np.float32)
    whole = kernel.accumulate(seed_K, weight_K, cuts[0], cuts[-1]).numpy()
    parts = [kernel.accumulate(seed_K, weight_K, *ends).numpy() for ends in itertools.pairwise(cuts)]
    assert whole.tobytes() == np.concatenate(parts).tobytes()

    theta, scale = (torch.linspace(-1, end, cuts[-1] - cuts[0]) for end in (1, 2))
    out, pieces = torch.empty_like(theta), torch.empty_like(theta)
    kernel.descend(theta, scale, seed, 0.5, -0.01, out, cuts[0])
    for start, stop in itertools.pairwise(cuts):
        part = slice(start - cuts[0], stop - cuts[0])
        kernel.descend(theta[part], scale[part], seed, 0.5, -0.01, pieces[part], start)
    assert out.numpy().tobytes() == pieces.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_portable_kernel_of_many_tiles_computes_the_definition(
    kind: NoiseKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = noise(kind, 99, 3, 5003)
    monkeypatch.setattr(portable, "TILE", 1000)
    kernel, theta = PortableKernel(kind, CPU), torch.zeros(5000)
    out = torch.full_like(theta, torch.nan)
    kernel.descend(theta, None, 99, 0.0, 1.0, out, 3)
    np.testing.assert_allclose(out.numpy(), whole, rtol=0, atol=1e-6)
    sum_S = kernel.accumulate(np.array([99], np.uint64), np.ones(1, np.float32), 3, 5003)
    np.testing.assert_allclose(sum_S.numpy(), whole, rtol=0, atol=1e-6)


@given(seeds, factors, factors, st.booleans(), some_kernel)
def test_descend_adds_scaled_noise_to_the_parent(
    seed: int, offset: float, gain: float, scaled: bool, which: tuple[NoiseKind, str]
) -> None:
    """The result is theta + scale * (offset + gain * noise), with each operation rounded to float32."""
    theta = torch.linspace(-2, 2, 5001)
    scale = torch.linspace(3, -1, 5001) if scaled else None
    out = torch.full_like(theta, torch.nan)
    KERNELS[which].descend(theta, scale, seed, offset, gain, out)
    perturbation = np.float32(offset) + np.float32(gain) * noise(which[0], seed, 0, 5001)
    expected = theta.numpy() + (perturbation if scale is None else scale.numpy() * perturbation)
    agree(which[0], out, expected, atol=1e-5 * (1 + abs(gain)))
    if offset == gain == 0:
        assert torch.equal(out, theta)


@pytest.mark.parametrize("which", sorted(KERNELS))
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_of_members_are_the_members(which: tuple[NoiseKind, str], scaled: bool) -> None:
    kernel, theta = KERNELS[which], torch.linspace(-2, 2, 5001)
    scale = torch.linspace(3, -1, 5001) if scaled else None
    seed_B, factor_B = np.array([7, 2**64 - 1, 0], np.uint64), np.array([0.3, -0.7, 0.0], np.float32)
    rows = torch.full((3, 5001), torch.nan)
    kernel.descend_rows(theta, scale, seed_B, factor_B, factor_B[::-1].copy(), rows)
    for seed, offset, gain, row in zip(seed_B, factor_B, factor_B[::-1], rows, strict=True):
        alone = torch.empty_like(theta)
        kernel.descend(theta, scale, int(seed), float(offset), float(gain), alone)
        assert torch.equal(row, alone)


@pytest.mark.parametrize("which", sorted(KERNELS))
def test_descend_in_place_changes_its_slice_alone(which: tuple[NoiseKind, str]) -> None:
    """The seed has 64 bits. The slice crosses the point where block numbers exceed 32 bits, and it overlaps one tile
    more than its size fills."""
    seed, start = 2**64 - 5, 2**34 - 1501
    theta, scale = torch.linspace(-1, 1, 4106), torch.linspace(3, -1, 4096)
    perturbation = np.float32(0.3) + np.float32(-0.7) * noise(which[0], seed, start, start + 4096)
    expected = theta.numpy().copy()
    expected[4:4100] += scale.numpy() * perturbation
    before = theta.clone()
    KERNELS[which].descend(theta[4:4100], scale, seed, 0.3, -0.7, theta[4:4100], start)
    agree(which[0], theta, expected, atol=1e-5)
    numbers = torch.from_numpy(np.array([seed], np.uint64).view(np.int64)), torch.tensor([0.3]), torch.tensor([-0.7])
    KERNELS[which].descend(before[4:4100], scale, *numbers, before[4:4100], start)
    assert torch.equal(before, theta)


@pytest.mark.parametrize("name", HERE)
def test_accumulate_adds_in_the_order_of_members(name: str) -> None:
    """The sum equals that of a plain loop of float32 multiply and add, to the bit."""
    seed_K = member_seeds(3, 5, 12)
    weight_K = np.random.default_rng(0).normal(size=12).astype(np.float32)
    expected = np.zeros(4200, np.float32)
    for seed, weight in zip(seed_K, weight_K, strict=True):
        expected += weight * noise("uniform", int(seed), 11, 4211)
    computed = KERNELS["uniform", name].accumulate(seed_K, weight_K, 11, 4211).numpy()
    assert computed.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_moments_of_its_distribution(kind: NoiseKind) -> None:
    drawn = noise(kind, 12345, 0, 1_000_000).astype(np.float64)
    fourth = {"uniform": 1 / 5, "gaussian": 3.0, "rademacher": 1.0}[kind]
    assert abs(drawn.mean()) < 0.004
    assert abs((drawn**2).mean() ** 0.5 - RMS[kind]) < 0.004
    assert abs((drawn**4).mean() - fourth) < 0.05
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 0.004


def test_seeds_of_members_differ_between_members_generations_and_runs() -> None:
    several = [member_seeds(run, generation, 5000) for run in (0, 1, 2**40) for generation in (5, 10)]
    assert len(np.unique(np.concatenate(several))) == 30_000
    np.testing.assert_array_equal(member_seeds(0, 5, 10), member_seeds(0, 5, 5000)[:10])


@pytest.mark.parametrize("which", sorted(KERNELS))
def test_fingerprint_tells_a_kernel_that_is_right_from_one_that_is_not(which: tuple[NoiseKind, str]) -> None:
    sample = fingerprint(KERNELS[which])
    assert fingerprint_agrees(which[0], sample)
    wrong = sample.copy()
    wrong[-1] += 1e-5
    assert not fingerprint_agrees(which[0], wrong)
    wrong[-1] = np.nan
    assert not fingerprint_agrees(which[0], wrong)
    assert not fingerprint_agrees(which[0], sample[:-1])


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_triton), "mps"])
def test_each_device_gets_its_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"cpu": "CpuKernel", "cuda": "CudaKernel", "mps": "PortableKernel"}
    assert type(kernel_for("uniform", torch.device(name))).__name__ == expected[name]
    if name == "cuda":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "spartan_ray.noise.cuda")
        assert isinstance(kernel_for("uniform", torch.device(name)), PortableKernel)


@needs_triton
def test_the_cuda_kernels_compile_once_a_kind_without_spills_and_round_every_operation(tmp_path: Path) -> None:
    """The kernels are compiled for three GPU architectures. They have no fused multiply-add in float32, are not
    compiled again for another seed or start, and use few registers, so that a multiprocessor is full of threads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_cuda.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    names = "_descend", "_accumulate", "_descend_from", "_descend", "_descend_from"  # the last two without a scale
    noise_kernels = {f"{name} {kind} {number}" for number, name in enumerate(names) for kind in KINDS}
    for architecture, kernels in json.loads(compiled).items():
        assert kernels.keys() == noise_kernels | {"_fold 0", "_fold 1"}, architecture
        for name, kernel in kernels.items():
            assert "fma.rn.f32" not in kernel["ptx"]
            # Gaussian noise is in float64, and its trigonometric functions have a path for arguments that do not occur.
            gaussian = "gaussian" in name
            assert kernel["registers"] <= (128 if gaussian else 40)
            assert kernel["local"] <= (48 if gaussian else 0)
        assert "add.rn.f32" in kernels["_accumulate uniform 1"]["ptx"]
        assert "cvt.rn.bf16" in kernels["_fold 1"]["ptx"]
        # A thread computes eight elements, with at most 26 instructions each.
        assert kernels["_accumulate uniform 1"]["loop"] <= 8 * 26


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("start", [0, 2**34 - 5001])
@pytest.mark.parametrize("name", [pytest.param("CudaKernel", marks=needs_triton), "PortableKernel"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_a_cpu_does(kind: NoiseKind, name: str, start: int) -> None:
    device = torch.device("cuda")
    kernel: Kernel = kernel_for(kind, device) if name == "CudaKernel" else PortableKernel(kind, device)
    assert type(kernel).__name__ == name
    assert fingerprint_agrees(kind, fingerprint(kernel))

    seed_K = np.array([0, 1, 2**31, 2**63, 2**64 - 1, *member_seeds(3, 5, 35)], np.uint64)
    weight_K = np.random.default_rng(0).normal(size=40).astype(np.float32)
    theta, scale = torch.linspace(-2, 2, 100_003), torch.linspace(3, -1, 100_003)
    for factors in (None, scale):
        for seed in seed_K[:5]:
            expected, moved = theta.clone(), theta.to(device)
            CpuKernel(kind).descend(theta, factors, int(seed), 0.3, -0.7, expected, start)
            kernel.descend(moved, None if factors is None else factors.to(device), int(seed), 0.3, -0.7, moved, start)
            agree(kind, moved.cpu(), expected.numpy(), atol=1e-5)
    expected = CpuKernel(kind).accumulate(seed_K, weight_K, start, start + 100_003)
    agree(kind, kernel.accumulate(seed_K, weight_K, start, start + 100_003).cpu(), expected.numpy(), atol=1e-4)
