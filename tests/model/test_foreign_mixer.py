"""A mixer from another package, `tests/model/foreign`, through its entry point alone: it trains, is planned, is cut
over ranks and stages, saves and goes on as the built-in ones do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.compatibility import check_compatible
from sleeptrain.config.compose import compose
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.train import trainer
from tests.checkpoint.contents import tensors
from tests.parallel.processes import run_ranks
from tests.plan.test_ranks import check

FOREIGN = Path(__file__).parent / "foreign"
ROWS, STEPS = 8, 4
SETTINGS = (
    "experiment=rule110",
    "run.name=r",
    "data.rule110.width=6",
    "data.rule110.steps=2",
    "data.rule110.validation_samples=16",
    f"data.batch={ROWS}",
    f"train.tokens={STEPS * ROWS * 7}",
    "train.micro_batch=2",
    "train.device=cpu",
    "train.log_every=1",
    "train.eval_every=0",
    "model.layers=[linear_attention,attention,gated_deltanet,linear_attention]",
    "+model.mixers.linear_attention.num_heads=4",
    "model.dim=16",
    "model.ffn_dim=16",
    "model.attention.head_dim=8",
    "model.init_std=0.2",
    "sleep.passes=3",
    "checkpoint.every=2",
    "checkpoint.keep=10",
    "wandb.mode=disabled",
)


def sleeptrain(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{FOREIGN}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sleeptrain", *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(root: Path, *more: str) -> dict[int, dict[str, torch.Tensor]]:
    """Train, and return the tensors of each checkpoint by step."""
    config = compose([*SETTINGS, f"run.root={root}", *more])
    if (ranks := config.parallel.tensor * config.parallel.pipeline) == 1:
        assert trainer.train(config) == 0
    else:
        assert run_ranks(trainer.train, ranks, config, timeout=120) == [0] * ranks
    folders = sorted((root / "r" / "checkpoints").glob("step-*"))
    return {int(folder.name.removeprefix("step-")): tensors(folder) for folder in folders}


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.usefixtures("imported")
def test_two_tensor_ranks_and_two_stages_train_as_one_process_does(tmp_path: Path) -> None:
    single = train(tmp_path / "one")
    spread = train(tmp_path / "four", "parallel.tensor=2", "parallel.pipeline=2")
    assert list(single) == list(spread) == [0, 2, 4]
    for name, tensor in single[4].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(spread[4][name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))
    changed = single[4]["model/blocks.3.mixer.k_proj.weight"] - single[0]["model/blocks.3.mixer.k_proj.weight"]
    assert float(changed.abs().max()) > 1e-3, "the mixer was trained"


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    uncut = train(tmp_path / "whole")
    train(tmp_path / "cut", f"train.tokens={2 * ROWS * 7}", "optim.schedule=constant", "optim.warmup_fraction=0")
    again = ["optim.schedule=constant", "optim.warmup_fraction=0", "run.allow_changes=[train.tokens]"]
    cut = train(tmp_path / "cut", *again)
    same = train(tmp_path / "same", *again)
    assert list(uncut) == list(cut) == list(same)
    assert all(torch.equal(cut[4][name], tensor) for name, tensor in same[4].items())


@pytest.mark.timeout(150)
@pytest.mark.slow
@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (2, 2)])
def test_ranks_keep_and_send_what_a_plan_predicts(tensor: int, pipeline: int) -> None:
    parallel = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")
    check(compose([*SETTINGS, "model.vocab_size=17", *parallel]), tensor * pipeline)


def test_the_command_line_knows_it() -> None:
    found = json.loads(sleeptrain("plan", *SETTINGS, "--json", "--processes", "2", "parallel.tensor=2"))
    assert found["stages"]


@pytest.mark.slow
def test_a_run_of_the_command_line_trains_it_in_its_own_processes(tmp_path: Path) -> None:
    sleeptrain("train", *SETTINGS, f"run.root={tmp_path}", "parallel.tensor=2", "parallel.pipeline=2")
    assert (tmp_path / "r" / "checkpoints").is_dir()


def test_every_parameter_is_cut_as_the_spec_says() -> None:
    config = compose(SETTINGS).model
    config.vocab_size = 8
    model, sharding = Hybrid(config), ModelSharding(config, 2)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        parts = [sharding.take(name, parameter.detach(), rank) for rank in range(2)]
        assert torch.equal(sharding.join(name, parts), parameter)


def test_its_weights_do_not_load_into_a_model_with_other_settings() -> None:
    saved = compose(SETTINGS).model
    check_compatible(saved, compose(SETTINGS).model)
    other = compose([*SETTINGS, "++model.mixers.linear_attention.num_heads=2"]).model
    with pytest.raises(ConfigError) as refused:
        check_compatible(saved, other)
    [line] = refused.value.details
    assert line.startswith("model.mixers: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("++model.mixers.linear_attention.num_heads=0", ["model.mixers.linear_attention.num_heads", "at least 1"]),
        ("+model.mixers.linear_attention.heads=4", ["model.mixers.linear_attention", "heads"]),
        ("+model.mixers.linear_attn.num_heads=4", ["model.mixers.linear_attn", "model.layers"]),
        ("model.mixers.linear_attention.head_k_dim=4", ["+model.mixers.linear_attention.head_k_dim"]),
        ("model.layers=[linear_atention]", ["model.layers[0]", "did you mean 'linear_attention'"]),
    ],
)
def test_its_settings_are_checked(change: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([*SETTINGS, change])
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)
