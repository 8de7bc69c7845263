"""Whole runs under every kind of layout: losses, weights and memory are those of one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.config.compose import compose
from sleeptrain.errors import ConfigError
from sleeptrain.train import trainer
from sleeptrain.train.checkpoint import checkpoints, load_checkpoint
from sleeptrain.train.metrics import read_metrics
from tests.parallel.processes import run_ranks
from tests.train.conftest import tiny_shards

__all__ = ["tiny_shards"]  # the fixture holds here too

TOLERANCE = 1e-5  # fp32, after three steps of which each is larger than 1e-3
STEPS, ROWS = 3, 8

RULE110 = (
    "experiment=rule110",
    "data.rule110.width=6",
    "data.rule110.steps=2",
    "data.rule110.validation_samples=16",
    f"data.batch={ROWS}",
    f"train.tokens={STEPS * ROWS * 7}",
)
SHARDS = ("experiment=stdlib", "sleep.curriculum=[]", "optim.warmup_fraction=0", "sleep.passes=2")


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """Workers are forks: what they import is imported once, here. The ranks are on the CPU, also beside CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("megatron.core")
        pytest.importorskip("deepspeed")
        yield


def settings(folder: Path, *more: str) -> list[str]:
    return [
        *(RULE110 if not any("data=stdlib" in m for m in more) else SHARDS),
        f"run.root={folder}",
        "run.name=r",
        "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet]",
        "model.dim=16",
        "model.ffn_dim=16",
        "model.attention.head_dim=8",
        "model.init_std=0.2",
        "sleep.passes=2",
        "train.device=cpu",
        "train.log_every=1",
        "train.eval_every=0",
        "train.eval_batches=2",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=100",
        "wandb.mode=disabled",
        *more,
    ]


def layout(tensor: int, pipeline: int, zero: int) -> tuple[str, ...]:
    return (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero={zero}")


def train(folder: Path, *more: str, ranks: int = 1) -> None:
    """A run in one process (this one) or in `ranks` forks."""
    config = compose(settings(folder, *more))
    if ranks == 1:
        assert trainer.train(config) == 0
    else:
        assert run_ranks(trainer.train, ranks, config, timeout=120) == [0] * ranks


def records(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "r" / "metrics.jsonl")


def saved(folder: Path, index: int = -1) -> dict[str, Any]:
    return load_checkpoint(checkpoints(folder / "r" / "checkpoints")[index])


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{path}/{key}").items()}


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What a record says of the mathematics: loss, norm, rate, evaluation."""
    kept = {key: record[key] for key in ("loss", "grad_norm", "lr", "eval") if key in record}
    listed = {name: leaf if isinstance(leaf, list) else [leaf] for name, leaf in flat(kept).items()}
    return {f"{n}[{i}]": value for n, leaves in listed.items() for i, value in enumerate(leaves) if value is not None}


def assert_same(found: Path, wanted: Path) -> None:
    """Records and the last checkpoint."""
    for a, b in zip(records(found), records(wanted), strict=True):
        assert {"step", "tokens"} <= a.keys() and (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        found_numbers, wanted_numbers = numbers(a), numbers(b)
        assert found_numbers.keys() == wanted_numbers.keys()
        for name, value in wanted_numbers.items():
            assert found_numbers[name] == pytest.approx(value, rel=TOLERANCE), f"{name} of step {a['step']}"
    a, b = saved(found), saved(wanted)
    assert a["data"] == b["data"]
    for part in ("model", "optim", "carried"):
        ours, theirs = flat(a[part]), flat(b[part])
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if tensor is not None:
                torch.testing.assert_close(ours[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, imported: None) -> Path:
    folder = tmp_path_factory.mktemp("rule110")
    train(folder, "train.micro_batch=2")
    return folder


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "zero"),
    [
        (1, 1, 2, 0),
        (1, 1, 2, 1),
        (1, 1, 2, 2),
        (2, 1, 1, 1),
        (1, 2, 1, 1),
        (1, 2, 2, 1),
        (2, 2, 1, 1),
        (2, 1, 2, 2),
    ],
)
def test_a_run_equals_that_of_one_process(
    tmp_path: Path, one_process: Path, tensor: int, pipeline: int, data: int, zero: int
) -> None:
    train(tmp_path, *layout(tensor, pipeline, zero), "train.micro_batch=2", ranks=tensor * pipeline * data)
    assert_same(tmp_path, one_process)
