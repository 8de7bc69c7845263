"""A checkpoint of any layout is read under any other: the tensors are equal to the bit, later losses the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sleeptrain.checkpoint import read as read_module
from sleeptrain.checkpoint.folder import checkpoints, entries
from sleeptrain.checkpoint.tensor_file import write_tensors
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from tests.checkpoint.contents import in_file, tensors
from tests.checkpoint.test_read import count_reads
from tests.parallel.layouts import Layout
from tests.parallel.processes import naming
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
    Layout(2, 2, 1, 1),
]
SHARED_HEAD = 6
# Stages of replicas, ZeRO-3, tensor ranks in stages with a shared head, and one process, which reads whole tensors.
CHAIN = [5, 3, 6, 0]
PAIRS = [(before, after) for before in range(7) for after in range(7)]
STEP_TOKENS = 4 * 40


def settings(index: int) -> tuple[str, ...]:
    """Only stages have several micro-batches; ZeRO-3 needs a single backward in each step."""
    more = ("parallel.split_head=true",) if index == SHARED_HEAD else ()
    return (*LAYOUTS[index].settings(), *more, f"train.micro_batch={2 if LAYOUTS[index].pipeline > 1 else 0}")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_shards: tuple[str, ...], imported: None) -> dict[int, Path]:
    """The folder of a run of three steps under each layout, made when a test first reads it."""

    class Runs(dict[int, Path]):
        def __missing__(self, index: int) -> Path:
            folder = tmp_path_factory.mktemp(f"layout{index}")
            train(folder, *text(tiny_shards), *settings(index), ranks=LAYOUTS[index].size)
            return self.setdefault(index, folder)

    return Runs()


def spy_on_open(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Each process writes the tensors that it would save into a folder, as soon as the run is open."""

    def spy(run: Run) -> None:
        with open(folder / f"{run.world.rank}.safetensors", "wb") as file:
            write_tensors(file, run.engine.local_tensors(run.carried))

    on_open(patch, spy)


def check(
    written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], pair: tuple[int, int], whole: bool = False
) -> None:
    """A run of one layout goes on from its second step under another. whole: the checkpoint has whole tensors."""
    before, after = pair
    folder, loaded, straight = tmp_path / "go-on", tmp_path / "loaded", written[0]
    loaded.mkdir()
    shutil.copytree(written[before], folder)
    *_, second, third = checkpoints(folder / "r" / "checkpoints")
    shutil.rmtree(third)
    expected = tensors(second)
    if whole:
        to_format_2(second)
    assert any(name.startswith("carried/") for name in expected), "the case needs memory that goes on"
    with pytest.MonkeyPatch.context() as patch:
        spy_on_open(patch, loaded)
        train(folder, *text(tiny_shards), *settings(after), ranks=LAYOUTS[after].size)
    found = tensors(loaded)
    assert found.keys() == expected.keys() - {"rng/torch"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    check_files(third, LAYOUTS[after])
    assert json.loads((third / "state.json").read_text())["written_by"] == dict(LAYOUTS[after]._asdict())
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)


def to_format_2(checkpoint: Path) -> None:
    """Rewrites a checkpoint as versions before fragments wrote it: whole tensors, each in a file of one process."""
    whole = sorted(tensors(checkpoint).items())
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    for rank in range(2):
        save_file(dict(whole[rank::2]), checkpoint / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors")
    (checkpoint / "manifest.json").unlink()
    manifest = {"format": 2, "files": entries(sorted(checkpoint.iterdir()))}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "r" / "metrics.jsonl") if "loss" in r}


def check_files(checkpoint: Path, layout: Layout) -> None:
    """Each process has written one file, and those of a stage about equally many bytes of tensors."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert [path.name for path in files] == [f"shard-{rank + 1:05d}.safetensors" for rank in range(layout.size)]
    sizes = [
        sum(part.values.nbytes for part in in_file(path) if part.name.split("/")[0] in ("model", "optim"))
        for path in files
    ]
    per_stage = layout.tensor * layout.data
    # Neighbouring ranks belong to one stage. The last one of several does not write its copy of the tied embedding.
    for first in range(0, layout.size - (per_stage if layout.pipeline > 1 else 0), per_stage):
        stage = sizes[first : first + per_stage]
        assert max(stage) <= 1.1 * sum(stage) / per_stage


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 5])
def test_all_processes_of_a_resume_read_about_the_bytes_of_the_checkpoint(
    written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], before: int
) -> None:
    """Two tensor ranks of two replicas, from whole tensors and from fragments. Checksums are not counted."""
    folder = tmp_path / "go-on"
    shutil.copytree(written[before], folder)
    *_, second, third = checkpoints(folder / "r" / "checkpoints")
    shutil.rmtree(third)

    def count(size: int) -> None:
        with open(tmp_path / f"read-{os.getpid()}", "ab") as file:
            file.write(bytes(size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_module, "GAP", 0)  # the model's rows are narrow
        count_reads(patch, count)
        train(folder, *text(tiny_shards), *(after := Layout(2, 1, 2, 1)).settings(), ranks=after.size)
    read = sum(path.stat().st_size for path in tmp_path.glob("read-*"))
    size = sum(tensor.nbytes for tensor in tensors(second).values())
    headers = sum(path.stat().st_size for path in second.glob("*.safetensors")) - size
    # All read the generator's state. Both tensor ranks read what both hold: norms, shared heads, retained documents.
    assert 0.95 * size < read < 1.3 * size + headers + 4 * torch.get_rng_state().nbytes


@pytest.mark.slow
@pytest.mark.parametrize("layout", [0, 5])
def test_a_checkpoint_of_whole_tensors(
    written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], layout: int
) -> None:
    check(written, tmp_path, tiny_shards, (5, layout), whole=True)


def one_more_step(folder: Path, settings: tuple[str, ...], step: int, layout: Layout) -> None:
    """A run ends with this step. What it writes is the same as if it were to go on, since the rate is constant."""
    more = (f"train.tokens={step * STEP_TOKENS}", "optim.schedule=constant", "run.allow_changes=[train.tokens]")
    train(folder, *settings, *more, ranks=layout.size)


@pytest.mark.usefixtures("imported")
def test_a_run_goes_on_from_layout_to_layout(tmp_path: Path, tiny_shards: tuple[str, ...]) -> None:
    """Each step is made in another layout, which finds in the checkpoint, to the bit, what the one before had."""
    folder, straight = tmp_path / "chain", tmp_path / "straight"
    end = f"train.tokens={len(CHAIN) * STEP_TOKENS}"
    train(straight, *text(tiny_shards), *settings(0), "optim.schedule=constant", end)
    expected: dict[str, torch.Tensor] = {}
    for step, index in enumerate(CHAIN, start=1):
        layout, loaded = LAYOUTS[index], tmp_path / f"loaded{step}"
        loaded.mkdir()
        with naming(f"{layout} makes step {step}"), pytest.MonkeyPatch.context() as patch:
            spy_on_open(patch, loaded)
            one_more_step(folder, (*text(tiny_shards), *settings(index)), step, layout)
            *_, last = checkpoints(folder / "r" / "checkpoints")
            if step > 1:
                found = tensors(loaded)
                assert found.keys() == expected.keys() - {"rng/torch"}
                assert not [name for name in found if not torch.equal(found[name], expected[name])]
            check_files(last, layout)
            assert json.loads((last / "state.json").read_text())["written_by"] == dict(layout._asdict())
            expected = tensors(last)
            assert any(name.startswith("carried/") for name in expected), "memory goes on"
        if step == len(CHAIN) - 1:
            to_format_2(last)
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_of_layouts(
    written: dict[int, Path], tmp_path: Path, tiny_shards: tuple[str, ...], pair: tuple[int, int]
) -> None:
    check(written, tmp_path, tiny_shards, pair)
