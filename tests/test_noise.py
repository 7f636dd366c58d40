"""The noise contract: published vectors, an independent generator, slices, and every kernel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spartan_ray.config import NoiseKind
from spartan_ray.kernels import portable
from spartan_ray.kernels.cpu import CpuKernel
from spartan_ray.kernels.portable import PortableKernel
from spartan_ray.noise import (
    RMS,
    Kernel,
    fingerprint,
    fingerprint_agrees,
    member_seeds,
    noise,
    philox4x32_10,
)

KINDS: tuple[NoiseKind, ...] = ("uniform", "gaussian", "rademacher")
CPU = torch.device("cpu")
KERNELS = {(kind, name): make(kind) for kind in KINDS for name, make in
           (("cpu", CpuKernel), ("portable", lambda kind: PortableKernel(kind, CPU)))}  # fmt: skip
seeds = st.integers(0, 2**64 - 1)
factors = st.just(0.0) | st.floats(-10, 10, width=32)


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


@given(seeds, st.integers(0, 2**40), st.integers(1, 10_000), st.sampled_from(sorted(KERNELS)))
def test_kernels_compute_the_definition(seed: int, start: int, size: int, which: tuple[NoiseKind, str]) -> None:
    expected = noise(which[0], seed, start, start + size)
    once = np.array([seed], np.uint64), np.ones(1, np.float32)
    computed = KERNELS[which].accumulate(*once, start, start + size).numpy()
    if which[0] == "gaussian":
        np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-6)
    else:
        assert computed.tobytes() == expected.tobytes()


@given(seeds, st.lists(st.integers(0, 20_000), min_size=2, max_size=5, unique=True), st.sampled_from(sorted(KERNELS)))
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


@given(seeds, factors, factors, st.booleans(), st.sampled_from(sorted(KERNELS)))
def test_descend_adds_scaled_noise_to_the_parent(
    seed: int, offset: float, gain: float, scaled: bool, which: tuple[NoiseKind, str]
) -> None:
    """theta + scale * (offset + gain * noise), each operation rounded to float32."""
    theta = torch.linspace(-2, 2, 5001)
    scale = torch.linspace(3, -1, 5001) if scaled else None
    out = torch.full_like(theta, torch.nan)
    KERNELS[which].descend(theta, scale, seed, offset, gain, out)
    perturbation = np.float32(offset) + np.float32(gain) * noise(which[0], seed, 0, 5001)
    expected = theta.numpy() + (perturbation if scale is None else scale.numpy() * perturbation)
    if which[0] == "gaussian":
        np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-5 * (1 + abs(gain)))
    else:
        assert out.numpy().tobytes() == expected.tobytes()
    if offset == gain == 0:
        assert torch.equal(out, theta)


def test_accumulate_adds_in_the_order_of_members() -> None:
    """To the bit what a plain loop of float32 multiply and add gives."""
    seed_K = member_seeds(3, 5, 40)
    weight_K = np.random.default_rng(0).normal(size=40).astype(np.float32)
    expected = np.zeros(9000, np.float32)
    for seed, weight in zip(seed_K, weight_K, strict=True):
        expected += weight * noise("uniform", int(seed), 11, 9011)
    for name in ("cpu", "portable"):
        computed = KERNELS["uniform", name].accumulate(seed_K, weight_K, 11, 9011).numpy()
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_the_definition(kind: NoiseKind) -> None:
    kernel: Kernel = PortableKernel(kind, torch.device("cuda"))
    assert fingerprint_agrees(kind, fingerprint(kernel))
