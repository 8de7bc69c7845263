"""The stream of token shards against slices of one flat file and against webdataset's own pipeline, same tokens.

Our number includes everything that training needs: two mixed sources, shuffling, lanes, document ids, targets and
checksums. The flat file is read in random slices of T + 1 tokens. webdataset decodes and shuffles documents; they are
concatenated into rows of T + 1 tokens. Both yield batches of inputs and targets (int64) without document ids. Files are
in the page cache.

Documents have T tokens on average, so that all three read pieces of similar size. The last case has short documents in
long rows, where a slice of the flat file holds many documents; it has no goal.

The comparison with a GPU: a 2B model costs at least 6 FLOPs per parameter and token (N=1; sleep and attention add to
it). Eight H200 reach at most 8 x 989 TFLOP/s in dense bf16, so they use at most 8 * 989e12 / (6 * 2e9) tokens a second.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks import Row
from benchmarks.timing import METHOD as METHOD
from benchmarks.timing import round_robin
from sleeptrain.data.assignment import MixtureShares, StreamSettings
from sleeptrain.data.shards import ShardWriter, TokenShards, write_index
from sleeptrain.data.stream import ShardStream

VOCAB_SIZE = 50_000
SHARD_BYTES = 16 * 2**20
SPREAD = 1.0  # sigma of the lognormal lengths of documents
ROWS = 8
CASES = ((2048, 2048), (8192, 8192), (8192, 1200))  # T, mean tokens of a document
SHARES = {"most": Fraction(7, 10), "rest": Fraction(3, 10)}
GPU_TOKENS_PER_SECOND = 8 * 989e12 / (6 * 2e9)
GOALS = {"memmap": 0.2, "webdataset": 4.0, "gpu": 10.0}


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    return [row for case in CASES for row in _compare(*case, 2**26 if quick else 2**27, 2 if quick else 5)]


def _compare(sequence: int, mean_tokens: int, num_tokens: int, rounds: int) -> list[Row]:
    steps = 2**24 // (ROWS * sequence)  # several parts of the plan, so that every round pays for it
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        _write(corpus, num_tokens, mean_tokens)
        candidates = {
            "stream": _stream(corpus, sequence, steps),
            "memmap": _memmap(corpus, sequence, steps),
            "webdataset": _webdataset(corpus, sequence, steps),
        }
        seconds = round_robin(candidates, rounds)
    rate = {name: steps * ROWS * sequence / seconds[name] for name in candidates}
    case = f"T={sequence}, documents of {mean_tokens}"
    goals = GOALS if sequence == mean_tokens else {}
    rows = [Row(f"{case}: {name}", rate[name] / 1e6, "M tokens/s") for name in candidates]
    for name in ("memmap", "webdataset"):
        rows.append(Row(f"{case}: stream against {name}", rate["stream"] / rate[name], "x", goals.get(name)))
    ratio = rate["stream"] / GPU_TOKENS_PER_SECOND
    return [*rows, Row(f"{case}: stream against a 2B model on 8 H200", ratio, "x", goals.get("gpu"))]


def _write(corpus: Path, num_tokens: int, mean_tokens: int) -> None:
    """Write documents of random tokens, 70 % of them to `most`, and a copy of all to one flat file."""
    rng = np.random.default_rng(0)
    with open(corpus / "flat.bin", "wb") as flat:
        for name, share in SHARES.items():
            folder = corpus / name
            folder.mkdir()
            writer = ShardWriter(folder, np.dtype("<u2"), SHARD_BYTES)
            written = number = 0
            while written < num_tokens * share:
                length = 2 + int(rng.lognormal(np.log(mean_tokens) - SPREAD**2 / 2, SPREAD))
                tokens = rng.integers(0, VOCAB_SIZE, length, dtype=np.uint16)
                writer.add(f"{number:09d}", tokens)
                flat.write(tokens.tobytes())
                written, number = written + length, number + 1
            write_index(
                folder, writer.close(), name=name, vocab_size=VOCAB_SIZE, tokenizer_hash="0" * 64, num_bytes=written
            )


def _stream(corpus: Path, sequence: int, steps: int) -> Callable[[], None]:
    sources = {name: TokenShards(corpus / name) for name in SHARES}
    stream = ShardStream(sources, StreamSettings(sequence, [MixtureShares(0, SHARES)]))

    def read() -> None:
        for _ in range(steps):
            stream.batch(ROWS)

    return read


def _memmap(corpus: Path, sequence: int, steps: int) -> Callable[[], None]:
    tokens = np.memmap(corpus / "flat.bin", np.uint16, "r")
    starts = np.random.default_rng(0).integers(0, len(tokens) - sequence - 1, (steps, ROWS))

    def read() -> None:
        for row_starts in starts.tolist():
            rows = [torch.from_numpy(tokens[start : start + sequence + 1].astype(np.int64)) for start in row_starts]
            batch = torch.stack(rows)
            batch[:, :-1], batch[:, 1:]

    return read


def _webdataset(corpus: Path, sequence: int, steps: int) -> Callable[[], None]:
    urls = sorted(str(path) for path in corpus.glob("*/*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=0).shuffle(1000).decode()
    rows = iter(
        dataset.repeat()
        .compose(lambda samples: _rows_of(samples, sequence + 1))
        .batched(ROWS, collation_fn=torch.stack)
    )

    def read() -> None:
        for _ in range(steps):
            batch = next(rows)
            batch[:, :-1], batch[:, 1:]

    return read


def _rows_of(samples: Iterable[dict[str, Any]], length: int) -> Iterator[torch.Tensor]:
    """Documents, concatenated and cut into rows of `length` tokens."""
    row, filled = torch.empty(length, dtype=torch.int64), 0
    for sample in samples:
        tokens = torch.from_numpy(sample["npy"].astype(np.int64))
        while len(tokens):
            part = tokens[: length - filled]
            row[filled : filled + len(part)] = part
            filled, tokens = filled + len(part), tokens[len(part) :]
            if filled == length:
                yield row
                row, filled = torch.empty(length, dtype=torch.int64), 0
