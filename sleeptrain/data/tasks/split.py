"""The split into training and held-out contents: a hash holds out an eighth, so no seed trains on held-out content."""

from __future__ import annotations

import hashlib

import numpy as np

SHARE = 8  # one in 8 contents is held out
# Draws for one row until one is on the right side. All fail only if there are few different contents.
ATTEMPTS = 1000


def is_held_out(content: bytes) -> bool:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") % SHARE == 0


def are_held_out(words_BW: np.ndarray) -> np.ndarray:
    """True for held-out contents: uint64 [B, W], W 64-bit words each -> bool [B]. The mixing is that of splitmix64.

    G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    mixed = np.zeros(len(words_BW), np.uint64)
    for index in range(words_BW.shape[1]):
        mixed = mixed + words_BW[:, index] + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed % np.uint64(SHARE) == 0
