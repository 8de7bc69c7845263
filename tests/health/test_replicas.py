"""Copies of the weights that differ in a bit are found, named, and not saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.errors import DivergedError
from sleeptrain.health import replicas
from sleeptrain.health.replicas import checksum, differing_ranks
from sleeptrain.train import trainer
from sleeptrain.train.run_state import Run
from tests.parallel.processes import run_ranks
from tests.parallel.test_train import layout, settings


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_a_checksum_sees_every_bit_and_every_place(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(replicas, "CHUNK", 64)
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected = int(checksum(values))
    assert int(checksum(values.clone())) == expected
    for place in {0, size // 2, size - 1}:
        for bit in (0, 12, 30):
            other = values.clone()
            other.view(torch.int32)[place] ^= 1 << bit
            assert int(checksum(other)) != expected, (place, bit)
    for one, two in ((0, 3), (3, 67)):  # inside a chunk, and in the same place of two chunks
        if two < size:
            other = values.clone()
            other[[one, two]] = other[[two, one]]
            assert int(checksum(other)) != expected, (one, two)
    zero = torch.zeros(size)
    assert int(checksum(zero)) != int(checksum(-zero)), "the sign of zero is a bit"


def test_a_checksum_sees_every_bit_of_bf16_weights() -> None:
    values = torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = int(checksum(values))
    for place in range(5):
        for bit in range(15):
            other = values.clone()
            other.view(torch.int16)[place] ^= 1 << bit
            assert int(checksum(other)) != expected, (place, bit)


@pytest.mark.parametrize(
    ("digests", "expected"),
    [("aaaa", []), ("aaba", [2]), ("abac", [1, 3]), ("ab", [0, 1]), ("aabb", [0, 1, 2, 3]), ("abc", [0, 1, 2])],
)
def test_the_minority_is_named_or_without_one_all(digests: str, expected: list[int]) -> None:
    assert differing_ranks(range(len(digests)), [d.encode() for d in digests]) == expected


def corrupt(monkeypatch: pytest.MonkeyPatch, rank: int, step: int, name: str) -> None:
    """A bit of a weight changes in one process, after the update of a step."""
    advance = Run.advance

    def corrupted(self: Run, *args: Any) -> None:
        advance(self, *args)
        if self.step == step and self.world.rank == rank:
            p = dict(self.model.named_parameters())[name]
            p.data.view(-1).view(torch.int32)[3] ^= 1

    monkeypatch.setattr(Run, "advance", corrupted)


def diverged(config: Any) -> str:
    with pytest.raises(DivergedError) as caught:
        trainer.train(config)
    return str(caught.value)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("spread", "ranks", "rank", "every", "expected"),
    [
        # Weights are always compared before a checkpoint, whatever the interval.
        (layout(1, 1, 1), 4, 2, 100, "rank 2 of ranks 0-3 (first in blocks.1.mlp.down_proj.weight)"),
        (layout(1, 2, 1), 4, 1, 1, "ranks 0-1 of ranks 0-1 (first in blocks.1.mlp.down_proj.weight)"),
    ],
)
def test_a_run_whose_replicas_differ_ends_and_names_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spread: tuple[str, ...],
    ranks: int,
    rank: int,
    every: int,
    expected: str,
) -> None:
    corrupt(monkeypatch, rank, 2, "blocks.1.mlp.down_proj.weight")
    config = compose(settings(tmp_path, *spread, f"health.compare_every={every}"))
    messages = run_ranks(diverged, ranks, config)
    assert len(set(messages)) == 1 and messages[0].startswith(f"step 2: the weights of replicas differ: {expected}. ")
    assert [p.stem for p in checkpoints(tmp_path / "r" / "checkpoints")] == ["step-00000000", "step-00000001"]


@pytest.mark.usefixtures("imported")
def test_zero_switches_the_comparison_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, 1, 2, "blocks.1.mlp.down_proj.weight")
    config = compose(settings(tmp_path, *layout(1, 1, 1), "health.compare_every=0"))
    assert run_ranks(trainer.train, 2, config) == [0, 0]
