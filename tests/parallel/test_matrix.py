"""Every layout with every way to sleep, through the trainer: it learns what one process learns.

Two clipped steps of AdamW and Muon on text: rows of three windows in which documents end and begin, and which go on
in the next step; blocks of every kind before, in and after the loop; one row at a time, with gradients accumulated
(under ZeRO-3 all at once). Losses, norms, held-out losses, weights, optimizer state and memory are compared.

The fast tests have four layouts, and over them every value of every option; the full product is slow. N=1
without feedback is omitted: it has no sleep pass. `test_nothing_else_is_omitted` runs the validation on all the others.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config import Config, validate
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import ParallelConfig
from sleeptrain.data.batch import PAD, Part
from sleeptrain.data.shards import write_shards
from sleeptrain.data.source import build_source
from sleeptrain.data.tokenizer import train_tokenizer
from sleeptrain.parallel.layout_check import check_layout
from sleeptrain.sleep.curriculum import step_shape
from sleeptrain.sleep.step import micro_batches
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import read_metrics
from tests.checkpoint.contents import contents
from tests.data.texts import make_texts
from tests.parallel.layouts import Layout
from tests.parallel.processes import run_ranks

# Of the greatest number of a tensor, in fp32. Sleep passes of other rows at once have other lengths, which round
# otherwise: gradients of decays, which nearly cancel, differ by 1.4e-5.
TOLERANCE = 3e-5
STEPS, ROWS, SEQUENCE, WINDOW, CLIP = 2, 4, 24, 8, 0.1


class Sleep(NamedTuple):
    passes: int
    feedback: str
    eviction: str
    tied: bool


LAYOUTS = [
    Layout(2, 1, 1, 1),
    Layout(1, 2, 1, 1),
    Layout(1, 4, 1, 1),
    Layout(1, 1, 2, 1),
    Layout(1, 1, 2, 2),
    Layout(1, 1, 2, 3),
    Layout(2, 2, 1, 1),
    Layout(2, 1, 2, 1),
    Layout(1, 2, 2, 1),
    Layout(1, 2, 2, 2),
]
LOOPS = [(1, "features"), (3, "features"), (3, "none")]
SLEEPS = [
    Sleep(passes, feedback, eviction, tied)
    for (passes, feedback), eviction, tied in itertools.product(LOOPS, ("hard", "sliding"), (True, False))
]


# Every value of every option, in few ways to sleep: each takes a run of one process.
COVERING = (
    Sleep(3, "features", "sliding", False),
    Sleep(3, "none", "hard", True),
    Sleep(1, "features", "sliding", True),
    Sleep(3, "features", "hard", True),
)


def covering() -> list[tuple[Layout, Sleep]]:
    """Each layout once; neighbours have other options."""
    return list(zip(LAYOUTS, itertools.cycle(COVERING), strict=False))


def matrix() -> Iterator[Any]:
    fast = covering()[5:9]  # ZeRO-3, and each two of tensor ranks, stages and replicas
    for layout, sleep in itertools.product(LAYOUTS, SLEEPS):
        name = "tensor{}-pipeline{}-data{}-zero{}-".format(*layout)
        name += f"N{sleep.passes}-{sleep.feedback}-{sleep.eviction}-{'tied' if sleep.tied else 'untied'}"
        yield pytest.param(layout, sleep, id=name, marks=() if (layout, sleep) in fast else pytest.mark.slow)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, imported: None) -> Path:
    """Shards of documents of which most are shorter than a row and some longer than three."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    texts = [text[: rng.choice((5, 15, 40, 400))] for text in make_texts(400)]
    tokenizer = train_tokenizer(texts, 301, folder / "tokenizer.model")
    for side, part in (("train", texts[:300]), ("validation", texts[300:])):
        write_shards(folder / side, part, tokenizer, name=side)
    return folder


def rows_at_once(layout: Layout) -> int:
    """`train.micro_batch`: one row, but all under ZeRO-3, which takes one backward a step."""
    return 0 if layout.zero == 3 else 1


def configuration(
    text: Path, folder: Path, layout: Layout, sleep: Sleep, micro_batch: int = 0, more: Sequence[str] = ()
) -> Config:
    return compose([
        "experiment=stdlib",
        f"data.shards.sources=[{{train: {text}/train, validation: {text}/validation}}]",
        f"data.shards.tokenizer={text}/tokenizer.model",
        f"data.sequence={SEQUENCE}",
        f"data.batch={ROWS}",
        f"run.root={folder}",
        "run.name=r",
        "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet,attention]",
        f"model.tie_embeddings={str(sleep.tied).lower()}",
        "model.dim=16",
        "model.ffn_dim=16",
        "model.attention.head_dim=8",
        "model.gated_deltanet.head_k_dim=8",
        "model.gated_deltanet.head_v_dim=8",
        "model.mamba2.num_heads=4",
        "model.mamba2.head_dim=8",
        "model.mamba2.state_dim=8",
        "model.init_std=0.2",
        # A tiny norm, and AdamW's division by it, would multiply the rounding that layouts differ by.
        "model.norm_eps=1e-2",
        "optim.adamw_eps=1e-4",
        "sleep=every",
        f"sleep.window={WINDOW}",
        f"sleep.passes={sleep.passes}",
        f"sleep.feedback={sleep.feedback}",
        f"sleep.eviction={sleep.eviction}",
        "sleep.core=[1,4]",
        "optim.warmup_fraction=0",
        "optim.muon_weight_decay=0.1",
        "optim.adamw_weight_decay=0.1",
        f"optim.clip_norm={CLIP}",
        f"train.tokens={STEPS * ROWS * SEQUENCE}",
        f"train.micro_batch={micro_batch}",
        "train.device=cpu",
        "train.log_every=1",
        "train.eval_every=0",
        "train.eval_batches=1",
        "checkpoint.every=0",
        "wandb.mode=disabled",
        *layout.settings(),
        *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[Sleep], Path]:
    """The run of one process, which holds all rows at once. It is made at its first use."""

    @lru_cache
    def run(sleep: Sleep) -> Path:
        folder = tmp_path_factory.mktemp("one")
        assert trainer.train(configuration(text, folder, Layout(1, 1, 1, 1), sleep)) == 0
        return folder

    return run


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """All results of a run by name: its records, and the tensors of its last checkpoint."""
    saved = contents(checkpoints(folder / "r" / "checkpoints")[-1])
    found = {"tokens": torch.tensor(saved["tokens"])}
    for record in read_metrics(folder / "r" / "metrics.jsonl"):
        said = {key: record[key] for key in ("loss", "grad_norm", "eval") if key in record}
        found |= {f"step {record['step']}{path}": leaf for path, leaf in leaves(said)}
    for part in ("model", "optim", "carried"):
        found |= {f"{part}{path}": leaf for path, leaf in leaves(saved[part])}
    return found | dict(readable(found))


def readable(found: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The retained keys and values, with zeros in place of pads: no token reads these, and they depend on the rows at
    once, of which the longest open document decides how much of a window a sleep pass computes."""
    for name, documents_BL in found.items():
        if name.endswith("documents_BL"):
            for kept in ("k_BLGD", "v_BLGD"):
                other = name.replace("documents_BL", kept)
                yield other, found[other] * (documents_BL != PAD)[..., None, None]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif tree is not None:
        yield path, torch.as_tensor(tree).double()


def deviations(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The greatest difference in each tensor, relative to the tensor's greatest number."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        for name, tensor in wanted.items()
        if tensor.numel()
    }


@pytest.mark.parametrize(("layout", "sleep"), list(matrix()))
def test_a_run_equals_that_of_one_process(
    tmp_path: Path,
    text: Path,
    one_process: Callable[[Sleep], Path],
    record_property: Callable[[str, object], None],
    layout: Layout,
    sleep: Sleep,
) -> None:
    wanted = numbers(one_process(sleep))
    norms = [float(value) for name, value in wanted.items() if name.endswith("grad_norm")]
    assert len(norms) == STEPS and min(norms) > 2 * CLIP, "every step is clipped"
    assert any(name.startswith("carried") for name in wanted), "memory goes on"
    config = configuration(text, tmp_path, layout, sleep, rows_at_once(layout))
    ranks = layout.size
    assert run_ranks(trainer.train, ranks, config) == [0] * ranks
    found = deviations(numbers(tmp_path), wanted)
    record_property("deviations", {part: worst(found, part) for part in ("step", "model", "optim", "carried")})
    assert not {name: deviation for name, deviation in found.items() if not deviation <= TOLERANCE}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(1, 1, 4, 1), Layout(1, 2, 2, 1), Layout(2, 1, 2, 1)], ids=str)
def test_groups_of_replicas_that_each_keep_the_state_equal_one_process(
    tmp_path: Path, text: Path, one_process: Callable[[Sleep], Path], layout: Layout
) -> None:
    more = (f"parallel.shard_replicas={layout.data // 2}",)
    config = configuration(text, tmp_path, layout, SLEEPS[-1], rows_at_once(layout), more)
    assert run_ranks(trainer.train, layout.size, config) == [0] * layout.size
    found = deviations(numbers(tmp_path), numbers(one_process(SLEEPS[-1])))
    assert not {name: deviation for name, deviation in found.items() if not deviation <= TOLERANCE}


BF16 = ("train.precision=bf16", f"train.tokens={ROWS * SEQUENCE}")  # one step: optimizers hold its gradients
BF16_SLEEP = Sleep(3, "features", "hard", True)


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The results of one process after one step, by precision."""
    found = {}
    for precision, more in (("bf16", BF16), ("fp32", BF16[1:])):
        folder = tmp_path_factory.mktemp(precision)
        assert trainer.train(configuration(text, folder, Layout(1, 1, 1, 1), BF16_SLEEP, more=more)) == 0
        found[precision] = numbers(folder)
    return found


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=str(layout), marks=() if index == 6 else pytest.mark.slow)
        for index, layout in enumerate(LAYOUTS)
    ],
)
def test_gradients_in_bf16_differ_by_less_than_its_rounding(
    tmp_path: Path,
    text: Path,
    in_one_process: dict[str, dict[str, torch.Tensor]],
    record_property: Callable[[str, object], None],
    layout: Layout,
) -> None:
    """All gradients together are nearer to those of one process in bf16 than these are to fp32.

    Tensor ranks round partial sums, too: their error is about as large as that of one process, and another one.
    """
    config = configuration(text, tmp_path, layout, BF16_SLEEP, rows_at_once(layout), BF16)
    assert run_ranks(trainer.train, layout.size, config) == [0] * layout.size
    found, bf16, fp32 = (moments(n) for n in (numbers(tmp_path), in_one_process["bf16"], in_one_process["fp32"]))
    share = float((found - bf16).norm() / (bf16 - fp32).norm())
    record_property("share", share)
    assert 0 < share <= (1 if layout.tensor == 1 else 1.5)


def moments(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradients of the first step in one vector: both optimizers' first averages, each tensor with norm 1."""
    named = sorted(name for name in found if name.endswith(("exp_avg", "momentum_buffer")))
    assert any("adamw" in name for name in named) and any("muon" in name for name in named)
    return torch.cat([found[name].flatten() / found[name].norm() for name in named])


# The gradients of kernels are ten thousand times smaller than others, and inherit their rounding.
OF_SMALL_GRADIENTS = 1e-3
NOT_IN_THE_MATRIX = (
    "model.layers=[jet,attention,jet,sliding_attention,jet]",
    "model.mixer_only=[2]",
    "model.norm=plain",
    "model.attention.qkv_bias=true",
    "model.attention.sliding_window=5",
    "model.jet={num_heads: 4, head_k_dim: 8, head_v_dim: 8, kernel_dim: 8}",
    "sleep.core=null",
    # The inserted block alone, then all blocks, then all but one; and two rates.
    "optim.frozen=['*','!blocks.2.*']",
    f"optim.curriculum=[{{tokens: {ROWS * SEQUENCE}}},{{tokens: {2 * ROWS * SEQUENCE}, frozen: [blocks.1.*]}}]",
    "optim.rates=[{parameters: 'blocks.2.*', factor: 3.0},{parameters: '*norm*', factor: 0.5}]",
)


@pytest.fixture(scope="module")
def frozen_start(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("frozen")
    config = configuration(text, folder, Layout(1, 1, 1, 1), SLEEPS[4], more=NOT_IN_THE_MATRIX)
    assert trainer.train(config) == 0
    return numbers(folder)


@pytest.mark.parametrize(
    "layout", [Layout(2, 2, 1, 1), Layout(1, 1, 2, 1), Layout(1, 1, 2, 2), Layout(1, 1, 2, 3)], ids=str
)
@pytest.mark.slow
def test_inserted_blocks_first_then_all(
    tmp_path: Path, text: Path, frozen_start: dict[str, torch.Tensor], layout: Layout
) -> None:
    """A model of Jet blocks learns the same when parts are frozen in turn and have their own rates."""
    config = configuration(text, tmp_path, layout, SLEEPS[4], rows_at_once(layout), NOT_IN_THE_MATRIX)
    ranks = layout.tensor * layout.pipeline * layout.data
    assert run_ranks(trainer.train, ranks, config) == [0] * ranks
    found = deviations(numbers(tmp_path), frozen_start)
    assert not {name: deviation for name, deviation in found.items() if not deviation <= OF_SMALL_GRADIENTS}


def worst(found: dict[str, float], part: str) -> float:
    return max(deviation for name, deviation in found.items() if name.startswith(part))


def test_nothing_else_is_omitted(text: Path, tmp_path: Path) -> None:
    config = configuration(text, tmp_path, LAYOUTS[0], SLEEPS[0])
    for layout, sleep in itertools.product(LAYOUTS, SLEEPS):
        config.parallel = ParallelConfig(layout.tensor, layout.pipeline, layout.zero)
        config.sleep.passes, config.sleep.feedback, config.sleep.eviction, config.model.tie_embeddings = sleep
        config.train.micro_batch = rows_at_once(layout)
        validate(config)
        assert check_layout(config, layout.size) == layout.data
    assert len(list(matrix())) == len(LAYOUTS) * len(LOOPS) * 2 * 2
    assert [layout for layout, _ in covering()] == LAYOUTS
    for position in range(4):
        assert {sleep[position] for _, sleep in covering()} == {sleep[position] for sleep in SLEEPS}


def test_the_text_exercises_the_matrix(text: Path, tmp_path: Path) -> None:
    """Several documents in a window, rows that go on, and replicas with different rounds."""
    config = configuration(text, tmp_path, LAYOUTS[0], SLEEPS[-1], rows_at_once(LAYOUTS[0]))
    source, halves = build_source(config.data, Part(0, 1)), [build_source(config.data, Part(r, 2)) for r in (0, 1)]
    several, going_on, different = [], [], []
    for _ in range(STEPS):
        batch = source.batch(ROWS)
        windows = batch.documents_BT.view(ROWS * SEQUENCE // WINDOW, WINDOW)
        several.append(any(len(set(row) - {-1}) > 1 for row in windows.tolist()))
        going_on.append(bool(batch.carried_B.any()))
        shape = step_shape(config, 1, 0)
        plans = [[m.rounds for m in micro_batches(half.batch(ROWS), shape, config)] for half in halves]
        different.append(plans[0] != plans[1])
    assert all(several) and all(going_on[1:]) and any(different)
