"""New runs that begin with the weights of another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.fit import WEIGHTS
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.checkpoint.place import Place
from sleeptrain.config.compose import compose
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.train.init_from import Renumbered
from tests.checkpoint.contents import InMemory, contents
from tests.checkpoint.test_folder import SHARD, flip
from tests.train.test_trainer import run, settings


def test_a_new_run_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    run(tmp_path / "old")
    old = contents(checkpoints(tmp_path / "old" / "r" / "checkpoints")[-1])
    assert (old["step"], old["tokens"], old["samples"]) == (12, 12 * 8 * 7, 12 * 8)
    run(tmp_path / "new", f"run.init_from={tmp_path / 'old' / 'r'}", "checkpoint.keep=9", "train.seed=5")
    first, *_ = (contents(path) for path in checkpoints(tmp_path / "new" / "r" / "checkpoints"))
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in old["model"].items())
    assert (first["step"], first["tokens"], first["samples"], first["optim"]) == (0, 0, 0, {})
    # The first weights may be gone when the run goes on.
    shutil.rmtree(tmp_path / "old")
    shutil.rmtree(tmp_path / "new" / "r" / "checkpoints" / "step-00000012")
    run(tmp_path / "new", f"run.init_from={tmp_path / 'old' / 'r'}", "checkpoint.keep=9", "train.seed=5")


def test_a_run_does_not_begin_with_older_weights_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "old")
    flip(tmp_path / "old" / "r" / "checkpoints" / "step-00000012" / SHARD, 0.5)
    init = f"run.init_from={tmp_path / 'old' / 'r'}"
    with pytest.raises(DataError, match=r"step-00000012 is damaged \(the checksum.*run\.allow_older=true"):
        run(tmp_path / "new", init)
    assert not (tmp_path / "new" / "r").exists()
    capsys.readouterr()
    run(tmp_path / "new", init, "run.allow_older=true")
    assert "step-00000012 is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_layers_that_are_new_keep_their_initial_values(tmp_path: Path) -> None:
    run(tmp_path / "old")
    init = f"run.init_from={tmp_path / 'old' / 'r' / 'checkpoints' / 'step-00000009'}"
    longer = "model.layers=[attention,gated_deltanet,gated_deltanet]"
    with pytest.raises(DataError, match=r"are missing \(blocks.2.*run.init_new"):
        run(tmp_path / "new", init, longer)
    assert not (tmp_path / "new" / "r").exists()
    run(tmp_path / "plain", longer, "checkpoint.keep=9")
    run(tmp_path / "new", init, longer, "run.init_new=['blocks.2.*']", "checkpoint.keep=9")
    new, plain = (contents(checkpoints(tmp_path / n / "r" / "checkpoints")[0])["model"] for n in ("new", "plain"))
    old = contents(tmp_path / "old" / "r" / "checkpoints" / "step-00000009")["model"]
    for name, tensor in new.items():
        assert torch.equal(tensor, plain[name] if name.startswith("blocks.2.") else old[name])


def test_allowances_need_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.init_new .* name the checkpoint in run\.init_from"):
        compose(settings(tmp_path, "run.init_new=[a]"))


def test_inserted_blocks_move_those_of_the_checkpoint_back() -> None:
    saved = InMemory({f"{WEIGHTS}blocks.{n}.w": torch.tensor([n]) for n in range(2)} | {"rng/torch": torch.zeros(1)})
    numbered = Renumbered(saved, inserted=[0, 2], num_blocks=4)
    assert sorted(numbered.forms) == [f"{WEIGHTS}blocks.1.w", f"{WEIGHTS}blocks.3.w", "rng/torch"]
    assert numbered.tensor(f"{WEIGHTS}blocks.3.w").tolist() == [1]
    assert numbered.elements(f"{WEIGHTS}blocks.1.w", Place.whole((1,))).tolist() == [0]


def test_an_extra_block_comes_after_the_model_where_it_is_refused() -> None:
    saved = InMemory({f"{WEIGHTS}blocks.{n}.w": torch.zeros(1) for n in range(3)})
    assert set(Renumbered(saved, [1], 2).forms) == {f"{WEIGHTS}blocks.{n}.w" for n in (0, 1, 2)}
