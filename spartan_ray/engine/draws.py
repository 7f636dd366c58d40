"""Random choices that are functions of a key, whatever the version of a library."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_key(*key: int) -> int:
    """63 random bits that are a function of a key of two integers."""
    return int(np.random.Philox(key=np.array(key, np.uint64)).random_raw()) >> 1


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1 that is a function of its key of two integers.

    It sorts the raw words of a counter generator, a stream that no NumPy release may change."""
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")
