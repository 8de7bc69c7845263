"""Memory does not grow with the corpus: a process streams an epoch of 4 GB of tokens and grows little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sleeptrain.data.shards import ShardWriter, write_index

NUM_TOKENS = 2**31  # of two bytes each
MEAN_TOKENS = 4096
MIB = 2**20
READER = """
import json, re, sys
from fractions import Fraction
from sleeptrain.data.assignment import MixtureShares, StreamSettings
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.stream import ShardStream

def peak():  # MiB; getrusage would tell that of the process that started this one, where it is greater
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

shards = TokenShards(sys.argv[1])
stream = ShardStream({"big": shards}, StreamSettings(8192, [MixtureShares(0, {"big": Fraction(1)})]), workers=1)
rows = 8
steps = shards.num_tokens // (rows * 8192)
peaks, tokens = [], 0
for step in range(steps):
    tokens += stream.batch(rows).tokens_BT.numel()
    if step in (steps // 10, steps - 1):
        peaks.append(peak())
print(json.dumps({"peaks": peaks, "tokens": tokens, "epochs": stream.epochs()["big"]}))
"""


def write_corpus(folder: Path) -> None:
    """Shards of random tokens, documents of 1 to 2 * MEAN_TOKENS."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 50_000, 2**22, dtype=np.uint16)
    writer = ShardWriter(folder, np.dtype("<u2"))
    written = number = 0
    while written < NUM_TOKENS:
        length = int(rng.integers(1, 2 * MEAN_TOKENS))
        start = int(rng.integers(0, len(pool) - length))
        writer.add(f"{number:09d}", pool[start : start + length])
        written, number = written + length, number + 1
    write_index(folder, writer.close(), name="big", vocab_size=50_000, tokenizer_hash="0" * 64, num_bytes=written)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_epoch_of_4_gb_is_read_in_constant_memory(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    result = json.loads(done.stdout)
    early, late = result["peaks"]
    print(f"peak {early:.0f} MiB after a tenth, {late:.0f} MiB at the end of {result['tokens']:,} tokens")
    assert result["tokens"] > 0.999 * NUM_TOKENS and result["epochs"] > 0.999
    # Only the orders of the groups that the eight lanes read, and open sidecars, may grow.
    assert late - early < 100
    assert late < 700
