"""Counter-based random numbers: each is a function of (seed, stream, counter), so no draws have to be replayed.

Only raw Philox words are used. NumPy guarantees that these never change, but not the distributions of its Generator.
J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

WORDS_PER_COUNT = 4  # 64-bit words drawn for each value of the counter
UINT64 = 2**64 - 1


def random_words(count: int, seed: int, stream: int, counter: int = 0) -> np.ndarray:
    """`count` random words, uint64 [count], from `counter` on. Each pair (seed, stream) has its own sequence."""
    key = np.array([seed & UINT64, stream & UINT64], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def random_order(num_items: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of `num_items` items, int64 [num_items], that depends on (seed, stream) only."""
    return np.argsort(random_words(num_items, seed, stream), kind="stable")


def named_stream(*names: str | int) -> int:
    """A stream number for these names, 63 bits of their hash. Streams of different names are independent."""
    digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
