"""`sleeptrain evaluate` repeats a run's own evaluations, and evaluates with other numbers of passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints, entries, write_manifest
from sleeptrain.cli import main
from sleeptrain.config import load_resolved, save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import ShardSource
from sleeptrain.data.source import build_source
from sleeptrain.train.evaluate import held_out
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.trainer import train
from tests.checkpoint.test_folder import flip
from tests.data.tasks.gsm_infinite.made import records, write

TINY = [
    "model.dim=16",
    "model.ffn_dim=16",
    "data.batch=8",
    "train.threads=1",
    "train.device=cpu",
    "wandb.mode=disabled",
]
CASES = {
    "rule110": ["experiment=rule110", "data.rule110.validation_samples=64", "train.tokens=840", "train.micro_batch=4"],
    "depo_small": ["experiment=depo_small", "data.depo.validation_samples=16", "train.tokens=800", "sleep.passes=3"],
}


@pytest.fixture(scope="module", params=list(CASES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    root = tmp_path_factory.mktemp("runs")
    config = compose([*CASES[request.param], *TINY, "train.eval_batches=2", f"run.root={root}", "run.name=r"])
    assert train(config) == 0
    return root / "r"


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["evaluate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_equals_the_evaluation_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = [record for record in read_metrics(run / "metrics.jsonl") if "eval" in record][-1]
    found = evaluated(capsys, str(run))
    assert (found["step"], found["tokens"]) == (last["step"], last["tokens"]) and found["eval"] == last["eval"]
    assert Path(found["checkpoint"]).name == f"step-{last['step']:08}"
    first = min((run / "checkpoints").glob("step-*"))
    assert evaluated(capsys, str(first))["eval"]["loss"] != last["eval"]["loss"]


def test_flags_set_passes_and_batches(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = evaluated(capsys, str(run))["eval"]
    found = evaluated(capsys, str(run), "--passes", "4", "1", "--batches", "1")["eval"]
    assert list(found["loss"]) == list(found["accuracy"]) == ["1", "4"]
    assert found["loss"]["1"] != found["loss"]["4"] and found["loss"]["1"] != usual["loss"]["1"]
    assert found["guessing"] == usual["guessing"]
    assert main(["evaluate", str(run), "--passes", "4"]) == 0
    output = capsys.readouterr().out
    assert "N=4  accuracy  " in output and "guessing  " in output and "N=1" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--passes", "0"], ["--passes", "at least 1"]),
        (["--batches", "0"], ["--batches", "at least 1"]),
        (["--window", "7"], ["sleep.window", "7"]),
        (["--device", "cuda"], ["cuda", "device"]),
    ],
)
def test_mistakes_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["evaluate", str(run), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and all(word in output.err for word in words), output.err


def test_an_older_checkpoint_is_evaluated_only_where_allowed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "r")
    *_, older, newest = checkpoints(tmp_path / "r" / "checkpoints")
    flip(newest / "state.json", 0.5)
    assert main(["evaluate", str(tmp_path / "r"), "--json"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and f"{newest.name} is damaged" in output.err and str(older) in output.err
    assert main(["evaluate", str(tmp_path / "r"), "--json", "--allow-older"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["checkpoint"] == str(older)
    assert output.err.count("\n") == 1 and f"{newest.name} is damaged" in output.err and older.name in output.err


def test_a_runs_commands_are_not_run_unless_they_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This holds for a run of a task, too: the settings of the checkpoint say what is read."""
    shutil.copytree(run, tmp_path / "r")
    newest = checkpoints(tmp_path / "r" / "checkpoints")[-1]
    config = load_resolved(newest / "config.yaml")
    config.data.source = "shards"
    place = f"pipe:touch {tmp_path}/mark; cat {tmp_path}/shard-{{0..1}}.tar"
    config.data.shards.sources = [ShardSource("text", place, place)]
    save_resolved(config, newest / "config.yaml")
    write_manifest(newest, entries([path for path in newest.iterdir() if path.name != "manifest.json"]))
    assert main(["evaluate", str(tmp_path / "r")]) == 2
    output = capsys.readouterr().err
    assert f"--allow-source '{place}'" in output.splitlines()[1] and not (tmp_path / "mark").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"{tmp_path} is neither a checkpoint nor the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_last_step_says_how_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No step belongs to the curriculum stage that follows the last one. N is drawn; the largest is evaluated."""
    staged = "sleep.curriculum=[{tokens: 800, passes: 8, batch: 32}]"
    sampled = ["sleep.passes=3", "sleep.sample_passes=true", "train.eval_every=2"]
    config = compose([*CASES["rule110"], *TINY, staged, *sampled, f"run.root={tmp_path}", "run.name=r"])
    assert train(config) == 0
    found = [record for record in read_metrics(tmp_path / "r" / "metrics.jsonl") if "eval" in record]
    assert len(found) == 3 and all(list(record["eval"]["loss"]) == ["1", "3"] for record in found)
    assert evaluated(capsys, str(tmp_path / "r"))["eval"] == found[-1]["eval"]


def test_held_out_problems_that_have_changed_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, first in (("train", 0), ("validation", 30)):
        write(tmp_path / f"{name}.jsonl", records(first, 12))
    files = [f"data.gsm_infinite.{name}={tmp_path}/{name}.jsonl" for name in ("train", "validation")]
    lengths = ["data.gsm_infinite.min_tokens=100", "data.gsm_infinite.max_tokens=220", "data.gsm_infinite.max_ops=3"]
    config = compose(
        [
            "experiment=gsm_small",
            "run.init_from=''",
            *files,
            *lengths,
            *TINY,
            "train.tokens=1500",
            f"run.root={tmp_path}",
            "run.name=r",
        ]
    )
    assert train(config) == 0
    evaluated(capsys, str(tmp_path / "r"))
    write(tmp_path / "validation.jsonl", records(60, 12))
    assert main(["evaluate", str(tmp_path / "r")]) == 2
    assert "the problems' sha256" in capsys.readouterr().err


def test_passes_of_a_model_that_cannot_sleep_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["model=transformer_tiny", "sleep.passes=1", "train.tokens=420"]
    config = compose([*CASES["rule110"], *TINY, *plain, f"run.root={tmp_path}", "run.name=r"])
    assert train(config) == 0
    assert main(["evaluate", str(tmp_path / "r"), "--passes", "1", "4"]) == 2
    assert "plain transformer" in capsys.readouterr().err


def test_as_many_rows_are_evaluated_as_the_batches_hold() -> None:
    """eval_batches x batch rows of a task, micro_batch at a time, or all rows if there are fewer."""
    overrides = ["experiment=rule110", "data.batch=6", "train.eval_batches=3", "data.rule110.validation_samples=100"]
    for more, sizes in (
        ([], [6, 6, 6]),
        (["train.micro_batch=3"], [3] * 6),
        (["data.rule110.validation_samples=7"], [6, 1]),
    ):
        config = compose([*overrides, *more])
        [batches] = held_out(build_source(config.data), config).values()
        assert [len(batch.tokens_BT) for batch in batches] == sizes


def test_text_sleeps_as_the_curriculum_says_and_is_reported(
    tiny_shards: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where stages change N, L and the batch, the evaluation and the report show the numbers of the run."""
    staged = "sleep.curriculum=[{tokens: 320, passes: 3}, {tokens: 640, window: 20, batch: 1}]"
    places = [f"run.root={tmp_path}", "run.name=r", "train.eval_every=4", "train.log_every=3", "health.norms_every=4"]
    sizes = [override for override in TINY if override != "data.batch=8"]
    assert train(compose(["experiment=stdlib", *tiny_shards, *sizes, staged, *places])) == 0
    last = [record for record in read_metrics(tmp_path / "r" / "metrics.jsonl") if "eval" in record][-1]
    found = evaluated(capsys, str(tmp_path / "r"))
    assert found["eval"] == last["eval"] and found["window"] == 20 and list(found["eval"]["loss"]) == ["1", "3"]
    assert main(["report", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "r: loss " in output and f"N=3 {last['eval']['loss']['3'][1]:.4f}" in output
    pictures = {path.stem.removeprefix("shards-") for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"loss", "loss_by_window-end", "training-loss", "norms", "run"}
    page = (tmp_path / "report" / "index.html").read_text()
    assert "{tokens:640,window:20,batch:1}" in page and "FLOPs not known" not in page
