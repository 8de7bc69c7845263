"""Made-up documents."""

from __future__ import annotations

import random

WORDS = ["def", "return", "self", "value", "for", "in", "range", "print", "import", "None", "True", "while", "class"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 120 words with indents, so that documents are of very different lengths."""
    rng = random.Random(seed)
    return [
        "".join(rng.choice(WORDS) + rng.choice([" ", "\n", "\n    ", "\t"]) for _ in range(rng.randint(1, 120)))
        for _ in range(count)
    ]
