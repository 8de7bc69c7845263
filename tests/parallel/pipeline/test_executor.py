"""The pipeline equals one process: losses, every gradient, and the memory after a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.state import Boundary, FastWeights
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.pipeline.executor import StageStep
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import StageMicroBatch
from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_rounds, window_facts
from tests.models import random_batch
from tests.parallel.cases import OTHER_OPTIONS, Case, random_state, tensors, whole_weights, within
from tests.parallel.processes import naming, run_cases, selected
from tests.parallel.state_shards import join_state, take_state

EXACT = dict(rtol=1e-9, atol=1e-10)
WINDOW = 4
FOUR = ("gated_deltanet", "attention", "mamba2", "gated_deltanet")
# Four rows: one document over three windows; two documents in a window; pads; a document that ends early.
DOCUMENTS = [[0] * 12, [0] * 3 + [1] * 6 + [2] * 3, [-1] * 5 + [0] * 3 + [1] * 4, [0] * 6 + [-1] * 6]


@dataclass(frozen=True)
class Layout:
    bounds: tuple[int, ...]
    tensor: int = 1
    rows_a_sequence: int = 1
    split_head: bool = False


def batch_of(case: Case) -> Batch:
    share = 0.3 if case.when == "unlabelled" else 0.8
    flags = [case.carried] * len(DOCUMENTS)
    return within(random_batch(DOCUMENTS, target_share=share, carried=flags, continues=[True] * 4), case.vocab_size)


def sequences_of(case: Case, rows_a_sequence: int) -> list[tuple[Batch, list[Round], range]]:
    batch, parts = batch_of(case), []
    for first in range(0, len(DOCUMENTS), rows_a_sequence):
        part = batch.rows(first, first + rows_a_sequence)
        rounds = plan_rounds(window_facts(part, WINDOW), case.passes, case.when, case.feedback)
        parts.append((part, rounds, range(first, first + rows_a_sequence)))
    return parts


def start_of(case: Case, rows: range) -> FastWeights:
    if not case.carried:
        return FastWeights((None,) * len(case.layers))
    two = random_state(case, 1)
    index = torch.tensor([row % 2 for row in rows])
    return two.rows(index)


def settings_of(case: Case) -> LoopSettings:
    return LoopSettings(case.core or (0, len(case.layers)), case.boundary)


def divisor_of(case: Case) -> int:
    return int((batch_of(case).targets_BT != IGNORE).sum())


@dataclass
class Result:
    loss: float
    gradients: dict[str, torch.Tensor]
    states: list[FastWeights]


@cache
def one_process(name: str, rows_a_sequence: int) -> Result:
    case = CASES[name]
    model = Hybrid(case.config).to(case.dtype)
    model.load_state_dict(whole_weights(case))
    total, states = 0.0, []
    for batch, rounds, rows in sequences_of(case, rows_a_sequence):
        losses, state = run_rounds(model, batch, rounds, start_of(case, rows), settings_of(case))
        states.append(state.detach())
        if losses:
            loss = torch.stack(list(losses.values())).sum() / divisor_of(case)
            loss.backward()
            total += float(loss.detach())
    zero = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return Result(total, zero, states)


@cache
def mesh_of(tensor: int, num_stages: int) -> Mesh:
    return Mesh.build(tensor, num_stages)


def one_rank(job: tuple[str, Layout]) -> Result:
    case, layout = CASES[job[0]], job[1]
    mesh = mesh_of(layout.tensor, len(layout.bounds) - 1)
    rank = mesh.pipeline.rank
    model = build_model(case.config, mesh, range(*layout.bounds[rank : rank + 2]), split_head=layout.split_head)
    model, sharding = model.to(case.dtype), ModelSharding(case.config, layout.tensor, model.head_part)
    weights = whole_weights(case)
    model.load_state_dict({n: sharding.take(n, weights[n], mesh.tensor.rank) for n in model.state_dict()})
    core, slides = case.core or (0, len(case.layers)), bool(case.boundary.sliding_window)
    stages = PipelineStages(layout.bounds, case.layers, core, slides, layout.split_head)
    parts = sequences_of(case, layout.rows_a_sequence)
    sequences = []
    for batch, rounds, rows in parts:
        start = take_state(sharding, start_of(case, rows), mesh.tensor.rank)
        held = tuple(s if i in model.layers else None for i, s in enumerate(start.layers))
        sequences.append(StageMicroBatch(model, batch, rounds, FastWeights(held), settings_of(case), divisor_of(case)))
    mailbox = Mailbox(mesh.pipeline.group, case.dtype, torch.device("cpu"))
    step = StageStep(schedule([rounds for _, rounds, _ in parts], stages), rank, sequences, mailbox, case.config.dim)
    step.run(lambda surrogate: surrogate.backward())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return Result(float(sum(s.loss for s in sequences)), gradients, [s.state for s in sequences])


def run_layout(names: Iterable[str], bounds: Sequence[int], **options: Any) -> dict[str, tuple[Layout, list[Result]]]:
    """The results of cases, by rank. bounds: of the stages but the last."""
    layouts = {name: Layout((*bounds, len(CASES[name].layers)), **options) for name in names}
    jobs = {name: (name, layout) for name, layout in layouts.items()}
    ranks = len(bounds) * options.get("tensor", 1)
    return {name: (layouts[name], found) for name, found in run_cases(one_rank, ranks, jobs).items()}


def assert_same(name: str, layout: Layout, found: list[Result]) -> None:
    case, expected = CASES[name], one_process(name, layout.rows_a_sequence)
    num_stages = len(layout.bounds) - 1
    # megatron-core's order of ranks: tensor ranks are neighbours.
    stages = [found[s * layout.tensor : (s + 1) * layout.tensor] for s in range(num_stages)]
    assert stages[-1][0].loss == pytest.approx(expected.loss, rel=1e-9)
    sharding = ModelSharding(case.config, layout.tensor)
    gradients: dict[str, torch.Tensor] = {}
    for stage, ranks in enumerate(stages):
        of_stage = VocabularyPart(stage, num_stages) if layout.split_head else None
        for name in ranks[0].gradients:
            joined = join(case, name, [rank.gradients[name] for rank in ranks], of_stage)
            gradients[name] = gradients[name] + joined if name in gradients else joined  # tied embeddings are in both
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(gradients[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    for seq, state in enumerate(expected.states):
        joined_stages = [join_state(sharding, [rank.states[seq] for rank in ranks]) for ranks in stages]
        layers = [next((s[i] for s in joined_stages if s[i] is not None), None) for i in range(len(case.layers))]
        for a, b in zip(tensors(FastWeights(tuple(layers))), tensors(state), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def join(case: Case, name: str, shards: list[torch.Tensor], head_part: VocabularyPart | None) -> torch.Tensor:
    """The gradient of the whole parameter, zero where a stage has only a part of the rows."""
    sharding = ModelSharding(case.config, len(shards), head_part)
    rule = sharding[name]
    if rule.part is None:
        return sharding.join(name, shards)
    joined = torch.zeros(case.vocab_size, case.config.dim, dtype=case.dtype)
    for rank, shard in enumerate(shards):
        [(start, stop)] = rule.ranges(rank, len(shards))
        joined[start:stop] = shard[: stop - start]
    return joined


CASES = {
    "one pass": Case(FOUR),
    "three passes": Case(FOUR, passes=3),
    "three passes, untied, memory carried in": Case(FOUR, passes=3, tied=False, carried=True),
    "options of other families": Case(
        FOUR, passes=3, carried=True, model=OTHER_OPTIONS | {"attention.post_norm": True, "attention.qk_norm": "all"}
    ),
    "without feedback": Case(FOUR, passes=3, feedback="none", carried=True),
    "unlabelled": Case(FOUR, passes=3, when="unlabelled", carried=True),
    "sliding": Case(FOUR, passes=3, boundary=Boundary(sliding_window=4), carried=True),
    "sliding, untied, without feedback": Case(
        FOUR, passes=3, boundary=Boundary(sliding_window=4), tied=False, feedback="none", carried=True
    ),
    "carried convolutions": Case(FOUR, passes=2, boundary=Boundary(carry_conv=True), carried=True),
    "core in the middle": Case((*FOUR, "gated_deltanet"), passes=3, core=(1, 4), carried=True),
    "core in the middle, without feedback": Case((*FOUR, "gated_deltanet"), passes=3, core=(2, 4), feedback="none"),
    "core in the middle, sliding, untied": Case(
        (*FOUR, "gated_deltanet"), passes=3, core=(1, 4), boundary=Boundary(sliding_window=4), tied=False, carried=True
    ),
    "core in one stage": Case(FOUR, passes=3, core=(2, 4), boundary=Boundary(sliding_window=4)),
    "core in the first stage": Case(FOUR, passes=3, core=(0, 1)),
    "jet, sandwich norms, a norm between passes": Case(
        ("attention", "jet", "sliding_attention", "jet"),
        passes=3,
        model={"mixer_only": [1], "sandwich_norms": True, "norm_between_passes": True},
        carried=True,
    ),
}


Results = dict[str, tuple[Layout, list[Result]]]


@pytest.fixture(scope="module")
def two_stages(request: pytest.FixtureRequest, imported: None) -> Results:
    return run_layout(selected(request, "test_two_stages", "name"), (0, 2))


@pytest.mark.parametrize("name", CASES)
def test_two_stages(name: str, two_stages: Results) -> None:
    """Each row is a micro-batch."""
    assert_same(name, *two_stages[name])


@pytest.mark.parametrize(
    ("rows_a_sequence", "names"),
    [
        pytest.param(2, tuple(CASES), marks=pytest.mark.slow),
        pytest.param(4, tuple(CASES), marks=pytest.mark.slow),
        (4, ("unlabelled", "sliding", "carried convolutions", "core in the middle")),
    ],
    ids=["two", "four", "four, some cases"],
)
@pytest.mark.usefixtures("imported")
def test_several_rows_in_a_micro_batch(rows_a_sequence: int, names: tuple[str, ...]) -> None:
    for name, found in run_layout(names, (0, 2), rows_a_sequence=rows_a_sequence).items():
        with naming(name):
            assert_same(name, *found)


# They have a loop of the last stages, a loop of the first stage alone, and passes that read what all stages wrote.
FAST_IN_FOUR = (
    "three passes, untied, memory carried in",
    "core in the middle, sliding, untied",
    "core in the first stage",
    "without feedback",
    "jet, sandwich norms, a norm between passes",
)


@pytest.fixture(scope="module")
def four_stages(request: pytest.FixtureRequest, imported: None) -> Results:
    return run_layout(selected(request, "test_four_stages", "name"), (0, 1, 2, 3))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST_IN_FOUR else pytest.mark.slow) for name in CASES]
)
def test_four_stages(name: str, four_stages: Results) -> None:
    assert_same(name, *four_stages[name])


@pytest.fixture(scope="module")
def with_tensor_ranks(request: pytest.FixtureRequest, imported: None) -> Results:
    return run_layout(selected(request, "test_tensor_ranks_in_stages", "name"), (0, 2), tensor=2)


@pytest.mark.parametrize(
    "name",
    [
        "unlabelled",
        "core in the middle, sliding, untied",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("three passes", "core in the middle", "sliding", "without feedback")
        ),
    ],
)
def test_tensor_ranks_in_stages(name: str, with_tensor_ranks: Results) -> None:
    assert_same(name, *with_tensor_ranks[name])


SHARED_HEAD = [
    (("three passes, untied, memory carried in",), 2, 1, 4),
    (("unlabelled",), 2, 2, 2),
    pytest.param(tuple(CASES), 4, 1, 1, marks=pytest.mark.slow),
    pytest.param(("three passes", "core in the middle, sliding, untied"), 2, 2, 1, marks=pytest.mark.slow),
    pytest.param(("options of other families",), 2, 1, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("names", "num_stages", "tensor", "rows_a_sequence"), SHARED_HEAD)
@pytest.mark.usefixtures("imported")
def test_stages_that_share_the_head(names: tuple[str, ...], num_stages: int, tensor: int, rows_a_sequence: int) -> None:
    options = dict(tensor=tensor, rows_a_sequence=rows_a_sequence, split_head=True)
    for name, found in run_layout(names, {2: (0, 2), 4: (0, 1, 2, 3)}[num_stages], **options).items():
        with naming(name):
            assert_same(name, *found)


@pytest.mark.usefixtures("imported")
def test_one_stage_needs_no_messages() -> None:
    [(name, found)] = run_layout(["three passes"], (0,)).items()
    assert_same(name, *found)
