"""Whole runs under every kind of layout: losses, weights and memory are those of one process."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain import cli
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.tasks.source import TaskSource
from sleeptrain.distributed import world as world_module
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline import micro_batch as sequence
from sleeptrain.sleep.loop import run_layers
from sleeptrain.sleep.rounds import Round
from sleeptrain.stop import EXIT_STOPPED, Stopped
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.run_state import Run
from sleeptrain.watch.progress import Phase
from tests.checkpoint.contents import contents
from tests.parallel.processes import PATIENCE, run_ranks
from tests.runs import on_open
from tests.train.conftest import tiny_shards

__all__ = ["tiny_shards"]  # makes the fixture known here

pytestmark = pytest.mark.usefixtures("imported")

TOLERANCE = 3e-5  # fp32, after three steps, each larger than 1e-3; processors differ by up to 1.3e-5
CARRIED = 1e-4  # of the memory, which sums the rounding of many tokens
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
        "checkpoint.every=1",
        "checkpoint.keep=100",
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
        assert run_ranks(trainer.train, ranks, config) == [0] * ranks


def records(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "r" / "metrics.jsonl") if "attempt" not in r]


def saved(folder: Path, index: int = -1) -> dict[str, Any]:
    return contents(checkpoints(folder / "r" / "checkpoints")[index])


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{path}/{key}").items()}


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, without times: loss, norm, rate, evaluation."""
    kept = {key: record[key] for key in ("loss", "grad_norm", "lr", "eval") if key in record}
    listed = {name: leaf if isinstance(leaf, list) else [leaf] for name, leaf in flat(kept).items()}
    return {f"{n}[{i}]": value for n, leaves in listed.items() for i, value in enumerate(leaves) if value is not None}


def assert_same(found: Path, wanted: Path) -> None:
    """Records and the last checkpoint."""
    for a, b in zip(records(found), records(wanted), strict=True):
        assert {"step", "tokens"} <= a.keys() and (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["flops"] == pytest.approx(b["flops"], rel=1e-9), "shares of processes are whole numbers"
        found_numbers, wanted_numbers = numbers(a), numbers(b)
        assert found_numbers.keys() == wanted_numbers.keys()
        for name, value in wanted_numbers.items():
            assert found_numbers[name] == pytest.approx(value, rel=TOLERANCE), f"{name} of step {a['step']}"
    a, b = saved(found), saved(wanted)
    assert a["data"] == b["data"]
    for part in ("model", "optim", "carried"):
        ours, theirs = flat(a[part]), flat(b[part])
        tolerance = CARRIED if part == "carried" else TOLERANCE
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if tensor is not None:
                torch.testing.assert_close(
                    ours[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, imported: None) -> Path:
    folder = tmp_path_factory.mktemp("rule110")
    train(folder, "train.micro_batch=2")
    return folder


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "zero"),
    [
        pytest.param(1, 1, 2, 0, marks=pytest.mark.slow),
        (1, 2, 2, 2),
        pytest.param(2, 2, 1, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_equals_that_of_one_process(
    tmp_path: Path, one_process: Path, tensor: int, pipeline: int, data: int, zero: int
) -> None:
    train(tmp_path, *layout(tensor, pipeline, zero), "train.micro_batch=2", ranks=tensor * pipeline * data)
    assert_same(tmp_path, one_process)


def test_replicas_under_a_stop_rule_equal_one_process(tmp_path: Path) -> None:
    """Law 2: each replica decides on its own rows, which stop after different passes."""
    rule = ("sleep.passes=3", "sleep.stop=change", "sleep.stop_threshold=0.975")
    train(tmp_path / "one", *rule)
    assert 2 < records(tmp_path / "one")[-1]["eval"]["passes"]["3"] < 3
    for zero in (0, 1):
        train(tmp_path / f"zero-{zero}", *rule, *layout(1, 1, zero), ranks=2)
        assert_same(tmp_path / f"zero-{zero}", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero"), [(2, 2, 1, 1), (1, 2, 2, 2), (1, 4, 1, 1)])
def test_stages_that_share_the_head(
    tmp_path: Path, tensor: int, pipeline: int, data: int, zero: int, tied: bool
) -> None:
    """With evaluation, which reads the logits of all stages."""
    more = ("model.vocab_size=17", f"model.tie_embeddings={tied}", "train.micro_batch=2", "train.eval_every=3")
    train(tmp_path / "one", *more)
    shared = (*layout(tensor, pipeline, zero), "parallel.split_head=true")
    train(tmp_path / "several", *more, *shared, ranks=tensor * pipeline * data)
    assert_same(tmp_path / "several", tmp_path / "one")


@pytest.mark.slow
def test_weights_cut_over_replicas_and_tensor_ranks(tmp_path: Path, one_process: Path) -> None:
    """ZeRO-3 takes one backward a step."""
    train(tmp_path, *layout(2, 1, 3), ranks=4)
    assert_same(tmp_path, one_process)


@pytest.fixture(scope="module")
def one_process_on_text(tmp_path_factory: pytest.TempPathFactory, tiny_shards: tuple[str, ...], imported: None) -> Path:
    folder = tmp_path_factory.mktemp("text")
    train(folder, *text(tiny_shards))
    return folder


def text(tiny_shards: tuple[str, ...]) -> tuple[str, ...]:
    """Rows in which documents begin, end and go on: plans differ by replica, memory is carried over steps."""
    return (*tiny_shards, "data.batch=4", "train.micro_batch=1", f"train.tokens={3 * 4 * 40}")


@pytest.mark.slow
def test_tokens_between_mixers_split_over_tensor_ranks(
    tmp_path: Path, one_process_on_text: Path, tiny_shards: tuple[str, ...]
) -> None:
    train(tmp_path, *text(tiny_shards), *layout(2, 1, 1), "parallel.sequence=true", ranks=2)
    assert saved(one_process_on_text)["carried"], "the case needs memory that goes on"
    assert_same(tmp_path, one_process_on_text)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("sleep.bptt_windows=1", "sleep.recompute=block"), marks=pytest.mark.slow),
        pytest.param(
            ("sleep.curriculum=[{tokens: 160, passes: 3, batch: 8}]", "parallel.split_head=true"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda more: more[0],
)
def test_two_stages_of_two_replicas(tmp_path: Path, tiny_shards: tuple[str, ...], more: tuple[str, ...]) -> None:
    train(tmp_path / "one", *text(tiny_shards), *more)
    train(tmp_path / "four", *text(tiny_shards), *more, *layout(1, 2, 1), ranks=4)
    assert_same(tmp_path / "four", tmp_path / "one")


@pytest.mark.parametrize(("pipeline", "zero"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.slow
def test_a_replica_without_a_target_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: int, zero: int
) -> None:
    drawn = TaskSource.batch

    def half_silent(source: TaskSource, rows: int) -> Batch:
        batch = drawn(source, rows)
        silent = torch.tensor([row >= rows // 2 for row in source.part.rows(rows)])
        return replace(batch, targets_BT=batch.targets_BT.masked_fill(silent[:, None], IGNORE))

    monkeypatch.setattr(TaskSource, "batch", half_silent)
    train(tmp_path / "one", "train.micro_batch=2")
    train(tmp_path / "parts", "train.micro_batch=2", *layout(1, pipeline, zero), ranks=2 * pipeline)
    assert_same(tmp_path / "parts", tmp_path / "one")


def test_bf16_in_stages(tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        train(tmp_path / name, "train.precision=bf16", *layout(1, ranks, 1), "train.micro_batch=2", ranks=ranks)
    first, wanted = records(tmp_path / "two")[0], records(tmp_path / "one")[0]
    assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_skipped_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], zero: int
) -> None:
    """The second step of one replica overflows, on one of its stages."""

    def breaks(made: Run) -> None:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            broken = made.step == 1 and made.world.rank == 1
            return (output[0] * torch.inf, output[1]) if broken and output[0] is not None else output

        next(iter(made.model.blocks.values())).register_forward_hook(hook)

    on_open(monkeypatch, breaks)
    train(tmp_path, *layout(1, 2, zero), "health.on_nonfinite=skip", "train.micro_batch=2", ranks=4)
    assert [r["skipped"] for r in records(tmp_path) if "loss" in r] == [0, 1, 1]
    # Rank 1 has the first stage in the second replica; both stages of both replicas have looked.
    assert "skipped step 2: " in (said := capfd.readouterr().err) and "first seen on rank 1 at window 1, pass 1" in said
    assert all(bool(w.isfinite().all()) for w in saved(tmp_path)["model"].values())
    before, after = saved(tmp_path, 1)["model"], saved(tmp_path, 2)["model"]
    assert all(torch.equal(after[name], w) for name, w in before.items()), "the broken step changes nothing"


def test_too_few_micro_batches_are_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"

    def message(run: Run, text: str) -> None:
        with said.open("a") as file:
            file.write(f"{text}\n" if run.world.is_main else "")

    monkeypatch.setattr(Run, "message", message)
    train(tmp_path, *layout(1, 2, 1), f"train.tokens={ROWS * 7}", ranks=2)
    (cost,) = [line for line in said.read_text().splitlines() if line.startswith("r: ")]
    (warning,) = [line for line in said.read_text().splitlines() if line.startswith("warning: ")]
    assert cost.endswith("FLOPs")
    assert warning.startswith("warning: a step has 1 micro-batch (train.micro_batch=0) for the 2 stages")
    assert "set train.micro_batch=4" in warning


@pytest.mark.parametrize(
    ("more", "ranks", "message"),
    [
        (("parallel.tensor=2",), 1, "start 2 processes"),
        (("parallel.pipeline=2", "parallel.zero=3"), 2, "parallel.zero=3 does not go with parallel.pipeline=2"),
        (("parallel.pipeline=2", "sleep.recompute=window"), 2, "use sleep.recompute=pass"),
        (
            ("parallel.zero=3", "train.micro_batch=2"),
            2,
            "parallel.zero=3 takes one backward a step.*train.micro_batch=0",
        ),
        (("parallel.zero=3", "sleep.bptt_windows=1"), 2, "parallel.zero=3 takes one backward a step"),
    ],
)
def test_an_unsupported_layout_is_refused_before_anything_is_written(
    tmp_path: Path, more: tuple[str, ...], ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=message):
        trainer.train(compose(settings(tmp_path, *more)))
    assert not (tmp_path / "r").exists()


def test_a_layout_that_all_refuse_is_said_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_PORT": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(["train", *settings(tmp_path, "parallel.tensor=2")]) == 2
        said = capfd.readouterr().err
        assert ("start 4 processes" in said) is (rank == 0) and (said == "") is (rank > 0)
    assert not (tmp_path / "r").exists()


@dataclass
class Control:
    """Counts the exchanges of all processes at each step, in one of them."""

    exchanges: int = 0
    by_step: list[int] = field(default_factory=list)
    group: object = field(default_factory=object)

    def count(self, patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.exchanges += any(a is self.group for a in (*arguments, *options.values()))
            return function(*arguments, **options)

        patch.setattr(module, name, counted)

    def attend(self, run: Run) -> None:
        self.group = run.world.control
        advance = run.advance

        def advanced(*arguments: Any) -> None:
            self.by_step.append(self.exchanges)
            advance(*arguments)

        run.advance = advanced  # type: ignore[method-assign]


def _exchanges(config: Config) -> list[int]:
    control = Control()
    with pytest.MonkeyPatch.context() as patch:
        control.count(patch, world_module, "all_reduce_small")
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
            control.count(patch, dist, name)
        on_open(patch, control.attend)
        assert trainer.train(config) == 0
    return control.by_step


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.slow), ("health.spike_factor=25",)])
def test_a_step_takes_one_small_exchange_of_all_processes(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Of its loss and norm, and of the next step's counts, plans and stops; no more where spikes are watched."""
    more = (f"train.tokens={5 * ROWS * 7}", "checkpoint.every=0", "train.eval_every=0", *more)
    by_step = run_ranks(_exchanges, 2, compose(settings(tmp_path, *layout(1, 1, 2), *more)))[1]
    assert len(by_step) == 5
    assert {b - a for a, b in pairwise(by_step[1:])} == {1}, "the first step also proves the precision"


def _stopped_after(config: Config, last: int, step: int) -> int:
    """The exit code of this rank's run, in which rank `last` is asked to stop after a step."""

    def ask(run: Run) -> None:
        advance = run.advance

        def advanced(*arguments: Any) -> None:
            advance(*arguments)
            if (run.step, run.world.rank) == (step, last):
                os.kill(os.getpid(), signal.SIGTERM)

        run.advance = advanced  # type: ignore[method-assign]

    with pytest.MonkeyPatch.context() as patch:
        on_open(patch, ask)
        try:
            return trainer.train(config)
        except Stopped as end:
            return int(str(end.code))


@pytest.mark.slow
def test_sixty_four_processes_start_step_save_and_go_on(tmp_path: Path) -> None:
    """Two tensor ranks, two stages, sixteen replicas. A fork takes some 60 MiB beside the pages that all share."""
    more = ("data.batch=64", "train.micro_batch=2", f"train.tokens={STEPS * 64 * 7}", "checkpoint.every=0")
    train(tmp_path / "one", *more)
    config = compose(settings(tmp_path / "many", *layout(2, 2, 1), *more))
    assert run_ranks(_stopped_after, 64, config, 63, 1, timeout=6 * PATIENCE) == [EXIT_STOPPED] * 64
    assert run_ranks(trainer.train, 64, config, timeout=6 * PATIENCE) == [0] * 64
    assert_same(tmp_path / "many", tmp_path / "one")


def test_each_stage_knows_which_round_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forwards and backwards of training, and in an evaluation."""
    made, seen = list[Run](), set[tuple[Any, ...]]()

    def spied(model: Any, r: Round, *rest: Any) -> Any:
        here = made[0].progress.now
        assert (here.window, here.pass_index) == (r.window + 1, r.pass_index), here
        training = here.phase != Phase.EVALUATION
        assert not training or here.phase == (Phase.BACKWARD if torch.is_grad_enabled() else Phase.FORWARD)
        seen.add((here.phase, here.window, here.pass_index))
        return run_layers(model, r, *rest)

    def ranked(config: Config) -> set[tuple[Any, ...]]:
        trainer.train(config)
        return seen

    on_open(monkeypatch, made.append)
    monkeypatch.setattr(sequence, "run_layers", spied)
    config = compose(settings(tmp_path, *layout(1, 2, 1), "train.micro_batch=2"))
    for rounds in run_ranks(ranked, 2, config):
        phases = (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATION)
        assert rounds == {(phase, *place) for phase in phases for place in ((1, 1), (1, 2), (2, 1))}
