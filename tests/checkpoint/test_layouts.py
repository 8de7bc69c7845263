"""A checkpoint of any layout is read under any other: the tensors are equal to the bit, later losses the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from tests.checkpoint.contents import tensors
from tests.parallel.layouts import Layout
from tests.parallel.test_train import text, train
from tests.runs import on_open
from tests.train.conftest import tiny_shards

__all__ = ["tiny_shards"]  # this module uses the fixture, too


LAYOUTS = [
    Layout(1, 1, 1, 1),
    Layout(2, 1, 1, 2),
    Layout(1, 2, 1, 1),
    Layout(1, 1, 2, 3),
    Layout(2, 2, 1, 1),
    Layout(1, 2, 2, 1),
]
# Each layout once before and once after.
COVERING = [(0, 5), (5, 3), (3, 4), (4, 1), (1, 2), (2, 0)]
LATER = [pair for pair in ((a, b) for a in range(6) for b in range(6)) if pair not in COVERING]


def settings(layout: Layout) -> tuple[str, ...]:
    """ZeRO-3 needs a single backward in each step."""
    return (*layout.settings(), "train.micro_batch=0") if layout.zero == 3 else layout.settings()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_shards: tuple[str, ...], imported: None) -> dict[int, Path]:
    """The folder of a run of three steps under each layout, made when a test first reads it."""

    class Runs(dict[int, Path]):
        def __missing__(self, index: int) -> Path:
            folder = tmp_path_factory.mktemp(f"layout{index}")
            train(folder, *text(tiny_shards), *settings(LAYOUTS[index]), ranks=LAYOUTS[index].size)
            return self.setdefault(index, folder)

    return Runs()


def spy_on_open(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Each process writes the tensors that it would save into a folder, as soon as the run is open."""

    def spy(run: Run) -> None:
        save_file(run.engine.local_tensors(run.carried), folder / f"{run.world.rank}.safetensors")

    on_open(patch, spy)


def check(written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], pair: tuple[int, int]) -> None:
    """A run of one layout goes on from its second step under another."""
    before, after = pair
    folder, loaded, straight = tmp_path / "go-on", tmp_path / "loaded", written[0]
    loaded.mkdir()
    shutil.copytree(written[before], folder)
    *_, second, third = checkpoints(folder / "r" / "checkpoints")
    shutil.rmtree(third)
    expected = tensors(second)
    assert any(name.startswith("carried/") for name in expected), "the case needs memory that goes on"
    with pytest.MonkeyPatch.context() as patch:
        spy_on_open(patch, loaded)
        train(folder, *text(tiny_shards), *settings(LAYOUTS[after]), ranks=LAYOUTS[after].size)
    shares = [load_file(path) for path in sorted(loaded.iterdir())]
    assert sum(map(len, shares)) == len({name for share in shares for name in share}), "each tensor has one owner"
    found = {name: tensor for share in shares for name, tensor in share.items()}
    assert found.keys() == expected.keys() - {"rng/torch"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    check_shares(shares, LAYOUTS[after])
    assert json.loads((third / "state.json").read_text())["written_by"] == dict(LAYOUTS[after]._asdict())
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "r" / "metrics.jsonl") if "loss" in r}


def check_shares(shares: list[dict[str, torch.Tensor]], layout: Layout) -> None:
    """Each process of a stage holds at most an equal share of it and one tensor."""
    per_stage = layout.tensor * layout.data
    # Neighbouring ranks belong to one stage.
    for first in range(0, layout.size, per_stage):
        stage = [[t.numel() for t in share.values()] for share in shares[first : first + per_stage]]
        total, largest = sum(map(sum, stage)), max(map(max, stage))
        assert all(sum(sizes) <= total / per_stage + largest for sizes in stage)


@pytest.mark.parametrize("pair", COVERING)
def test_another_layout(
    written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], pair: tuple[int, int]
) -> None:
    check(written, tmp_path, tiny_shards, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", LATER)
def test_every_other_pair_of_layouts(
    written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], pair: tuple[int, int]
) -> None:
    check(written, tmp_path, tiny_shards, pair)
