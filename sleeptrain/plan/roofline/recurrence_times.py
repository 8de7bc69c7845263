"""The time of flash-linear-attention's recurrences on an H200, from times that are published.

The FlashQLA repository gives times of version 0.5.1 with heads of 128 x 128, replayed as CUDA graphs, so without waits
for the host (benchmark/benchmark_results_H200.txt): a forward for 8 to 64 heads and rows of 2,048 to 32,768 tokens, a
backward for 4 to 32 heads and 8,192 or 32,768 tokens. Three terms describe them:

    launches * 2.5 us  +  chunks in sequence * time of a chunk  +  tokens * heads * time of a token

The second is the kernels that carry the state from chunk to chunk. Two rows of 4,096 tokens take 75 us less than one
of 8,192, which has as many tokens and 64 chunks more in sequence: 1.17 us a chunk. About 32 heads of all rows run at
once, more follow one another. The third is what runs in parallel over chunks.

`tests/plan/roofline/test_recurrence_times.py` compares the terms with the published times: none is shorter than its
published time by more than 1 %, one row of a forward is longer by at most 23 %.

Assumptions: the terms hold for shorter rows than any that is published. The chunks of all documents of a row follow
one another, though documents run side by side. Heads of other widths take a power of their size, which nothing
published supports. Mamba-2's recurrence, of which nothing is published, takes the share of the delta rule's time that
its kernels have.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH = 2.5e-6  # seconds of the shortest kernel, with the gap to the next
HEADS_AT_ONCE = 32
PUBLISHED_STATE = 128 * 128
POWER_OF_STATE = 0.7


@dataclass(frozen=True)
class RecurrenceTime:
    """kernels: launched. chunk: seconds of a chunk in sequence. token: seconds of a token of a head in parallel."""

    kernels: int
    chunk: float
    token: float

    def seconds(self, rows: int, chunks: int, tokens: int, heads: int, state: int = PUBLISHED_STATE) -> float:
        """chunks: of one row. tokens: of all rows. state: numbers of a head's state."""
        waves = max(1.0, rows * heads / HEADS_AT_ONCE)
        work = self.chunk * chunks * waves + self.token * tokens * heads
        return self.kernels * LAUNCH + work * (state / PUBLISHED_STATE) ** POWER_OF_STATE


DELTA_RULE = RecurrenceTime(9, 1.17e-6, 1.28e-9)
DELTA_RULE_BACKWARD = RecurrenceTime(15, 3.5e-6, 3.65e-9)
LINEAR_ATTENTION = RecurrenceTime(3, DELTA_RULE.chunk * 3 / 9, DELTA_RULE.token * 3 / 9)
LINEAR_ATTENTION_BACKWARD = RecurrenceTime(6, DELTA_RULE_BACKWARD.chunk * 6 / 15, DELTA_RULE_BACKWARD.token * 6 / 15)
