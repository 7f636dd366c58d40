"""Random draws that depend only on a key, not on a library's version, and the cases of a generation.

Shapes: N cases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spartan_ray.engine.strategies.requests import CaseSet
from spartan_ray.errors import InputError

# Keys that keep the random draws for different purposes apart. Each is used together with the seed.
CASES_OF_GENERATION = 1 << 33
GRADIENT_CASES_OF_GENERATION = 1 << 35
# Distance between the keys of successive draws in one phase.
DRAWS_APART = 1 << 44
# Used together with the seed of a member.
OWN_CASES = 1 << 43


def random_key(*key: int) -> int:
    """Return 63 random bits, a function of a key of two integers."""
    return int(np.random.Philox(key=np.array(key, np.uint64)).random_raw()) >> 1


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of 0..count-1, a function of a key of two integers.

    It is the order of the raw words of a counter-based generator, whose stream no NumPy release may change."""
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


def fractions(count: int, *key: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1), a function of a key of two integers."""
    word_N = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
    return np.ldexp((word_N >> np.uint64(11)).astype(np.float64), -53)


def share_cases(
    sets: tuple[CaseSet, ...], fitness: int | None, confirm: int | None, available: int
) -> dict[CaseSet, int]:
    """Return the number of cases of each set of a generation.

    `fitness` is the size of the set "fitness", `confirm` that of each other set. None means an equal share of the cases
    that the other sets leave. Raises InputError if the sets have more cases than are available."""
    wanted: dict[CaseSet, int | None] = {name: fitness if name == "fitness" else confirm for name in sets}
    given = sum(count or 0 for count in wanted.values())
    missing = sum(count is None for count in wanted.values())
    share = (available - given) // max(missing, 1)
    if given > available or (missing and share < 1):
        counts = ", ".join(f"{name} {count or 'the rest'}" for name, count in wanted.items())
        raise InputError(f"the cases of a generation ({counts}) do not fit the {available} available")
    return {name: count or share for name, count in wanted.items()}


def draw_cases(
    counts: dict[CaseSet, int], available: int, seed: int, generation: int, draw: int = 0
) -> dict[CaseSet, NDArray[np.int64]]:
    """Return disjoint sets of cases, drawn anew for each generation and for each draw in it."""
    drawn_N = permutation(available, seed, CASES_OF_GENERATION + generation + draw * DRAWS_APART)
    parts = np.split(drawn_N, np.cumsum(list(counts.values())))
    return {name: np.sort(part) for name, part in zip(counts, parts, strict=False)}


def gradient_cases(case_N: NDArray[np.int64], count: int, seed: int, generation: int) -> NDArray[np.int64]:
    """Return at most `count` of the cases, drawn anew for the gradient of each generation."""
    return case_N[permutation(len(case_N), seed, GRADIENT_CASES_OF_GENERATION + generation)[:count]]


def own_cases(case_N: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` of the cases, a function of the seed of a member, or all if there are no more than that.

    Each case gets a random word; the cases with the smallest words are drawn."""
    if count >= len(case_N):
        return case_N
    words_N = np.random.Philox(key=np.array((seed, OWN_CASES), np.uint64)).random_raw(len(case_N))
    return np.sort(case_N[np.argpartition(words_N, count)[:count]])
