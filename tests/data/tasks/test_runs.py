"""A small run of each task that stops in its middle and goes on is the same to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from tests.checkpoint.contents import contents
from tests.train.test_trainer import TIMES

SETTINGS = {
    "rule110": ["experiment=rule110", "data.rule110.width=6", "data.rule110.strings=2"],
    "depo": ["experiment=depo_small", "data.depo.nodes=4", "sleep.window=8", "data.depo.queries=2"],
    "gsm_infinite": ["experiment=gsm_small", "run.init_from=''", "data.gsm_infinite.min_tokens=70"],
}
KEYS = {
    "rule110": {"bits", "sampled"},
    "depo": {"accuracy_by_hops", "loss_by_hops"},
    "gsm_infinite": {"accuracy_by_ops"},
}


def run(name: str, folder: Path, tokens: int) -> None:
    common = [
        "model=tiny",
        "model.dim=16",
        "model.ffn_dim=16",
        "data.batch=4",
        "train.log_every=1",
        "train.eval_every=3",
        "train.eval_batches=2",
        "checkpoint.every=0",
        "sleep.passes=2",
        "optim.warmup_fraction=0",  # the learning rate depends on the tokens to come, which differ between the halves
        "wandb.mode=disabled",
        f"data.{name}.validation_samples=8",
    ]
    changes = ["run.allow_changes=[train.tokens]", f"run.root={folder}", "run.name=r", f"train.tokens={tokens}"]
    assert trainer.train(compose([*SETTINGS[name], *common, *changes])) == 0


def records(folder: Path) -> list[dict[str, object]]:
    found = [r for r in read_metrics(folder / "r" / "metrics.jsonl") if "attempt" not in r and "changes" not in r]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in found]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.slow
def test_a_run_in_two_parts_is_one_run(tmp_path: Path, name: str) -> None:
    run(name, tmp_path / "one", 2000)
    steps = [r for r in records(tmp_path / "one") if "loss" in r]
    middle = steps[len(steps) // 2]
    run(name, tmp_path / "two", int(middle["tokens"]))
    run(name, tmp_path / "two", 2000)
    ends = [checkpoints(tmp_path / part / "r" / "checkpoints")[-1] for part in ("one", "two")]
    uncut, parts = (contents(end) for end in ends)
    assert ends[0].name == ends[1].name and uncut["model"].keys() == parts["model"].keys()
    assert all((uncut["model"][key] == parts["model"][key]).all() for key in uncut["model"])
    assert steps == [r for r in records(tmp_path / "two") if "loss" in r]
    [*_, last] = [r["eval"] for r in records(tmp_path / "one") if "eval" in r]
    assert last == [r["eval"] for r in records(tmp_path / "two") if "eval" in r][-1]
    assert last["metrics"].keys() == last["accuracy"].keys() == {"1", "2"} and last["guessing"]
    assert last["metrics"]["2"].keys() == KEYS[name]
