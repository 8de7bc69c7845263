"""A step with graphs equals one without, in fp64. What is recorded is run again on the same memory: no GPU is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.config.schema import Config, SleepConfig, TrainConfig
from sleeptrain.data.batch import Batch
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import computing_in
from sleeptrain.model.mixers.spec import WIDE
from sleeptrain.model.state import FastWeights
from sleeptrain.ops import row_stacks
from sleeptrain.ops.row_stacks import RecordedRows
from sleeptrain.plan.activations import cuda_graph_bytes
from sleeptrain.sleep import precision
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.graphs import round_graphs
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from tests.models import random_batch, tiny_model
from tests.sleep.graphs.recorder import Recorder

WINDOW = 16


def text(first: int, second: int) -> list[list[int]]:
    """Two rows of 40 tokens, whose last window is short. Their first documents, of these lengths, end in the first."""
    return [[0] * first + [1] * (32 - first) + [2] * 8, [3] * second + [4] * (40 - second)]


# Passes over the first window sleep 11 or 7 tokens.
TEXTS = [text(5, 6), text(5, 8), text(9, 9), text(7, 5), text(9, 10), text(5, 7), text(11, 9)]


def batches() -> list[Batch]:
    carried = [[i > 0, False] for i in range(len(TEXTS))]
    return [
        random_batch(text, seed, 0.8, continues=[True, False], carried=carried[seed]) for seed, text in enumerate(TEXTS)
    ]


def config_of(model: Hybrid, passes: int, micro_batch: int = 0, **changes: Any) -> Config:
    sleep = SleepConfig(passes=passes, window=WINDOW, recompute="none", **changes)
    return Config(model=model.config, sleep=sleep, train=TrainConfig(tokens=1, micro_batch=micro_batch))


Outcome = tuple[StepResult, list[torch.Tensor]]


def steps(model: Hybrid, config: Config, graphs: RoundGraphs | None) -> list[Outcome]:
    """The steps of all texts, whose memory goes on from step to step, with an update after each."""
    outcomes, carried = list[Outcome](), None
    shape = StepShape(config.sleep.passes, WINDOW, 2)
    for batch in batches():
        model.zero_grad(set_to_none=True)
        result = forward_backward(step_context(config, shape, model, graphs=graphs), model, batch, shape, carried)
        carried = result.state
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        outcomes.append((result, gradients))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(g, alpha=1e-4)
    return outcomes


def tensors(state: FastWeights) -> list[torch.Tensor]:
    return list(state.to_state_dict().values())


def assert_equal(found: list[Outcome], expected: list[Outcome]) -> None:
    for (a, a_gradients), (b, b_gradients) in zip(found, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-11)
        pairs = zip([*tensors(a.state), *a_gradients], [*tensors(b.state), *b_gradients], strict=True)
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("passes", "changes"),
    [
        (1, {}),
        (3, {}),
        (3, {"eviction": "sliding", "conv_state": "carry"}),
        (2, {"feedback": "none", "core": [1, 2]}),
        (2, {"bptt_windows": 1, "micro_batch": 1}),
    ],
    ids=str,
)
def test_steps_equal_those_without_graphs(passes: int, changes: dict[str, Any]) -> None:
    recorder = compare(passes, **changes)
    assert recorder.replays > recorder.recorded > 0
    if passes == 3:
        assert recorder.pools < recorder.recorded // 2, "passes of two lengths share memory"


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_steps_whose_attention_reads_the_bounds_of_documents(eviction: str, by_bounds: list[torch.Tensor]) -> None:
    recorder = compare(2, eviction=eviction)
    assert recorder.replays > recorder.recorded > 0
    assert {len(bounds) for bounds in by_bounds} > {9}, "padded ones, and those without graphs"


def compare(passes: int, **changes: Any) -> Recorder:
    """The recorder of steps that were found equal."""
    recorder = Recorder()
    expected = steps(model := tiny_model(), config_of(model, passes, **changes), None)
    graphs = RoundGraphs(model := tiny_model(), recorder)
    assert_equal(steps(model, config_of(model, passes, **changes), graphs), expected)
    return recorder


def test_the_second_round_of_a_kind_is_recorded_and_later_ones_are_replayed() -> None:
    model, recorder = tiny_model(), Recorder()
    graphs, shape = RoundGraphs(model, recorder), StepShape(1, WINDOW, 2)
    for done, (recorded, replays) in enumerate([(0, 0), (6, 6), (6, 12)]):
        result = forward_backward(
            step_context(config_of(model, 1), shape, model, graphs=graphs),
            model,
            random_batch([[0] * 48, [1] * 48], done),
            shape,
            None,
        )
        assert result.num_rounds == 3
        assert (recorder.recorded, recorder.replays) == (recorded, replays), "two graphs a round"
        assert graphs.take() == ("train.cuda_graphs: 3 rounds recorded" if done == 1 else None)
    assert recorder.pools == 3


def test_the_plan_counts_what_graphs_read_and_leave() -> None:
    """Except before the first window: no memory is read there."""
    graphs, shape = RoundGraphs(model := tiny_model(), Recorder()), StepShape(3, WINDOW, 2)
    config, batch = config_of(model, 3), random_batch([[0] * 32] * 2, continues=[True, True])
    for _ in range(2):
        forward_backward(step_context(config, shape, model, graphs=graphs), model, batch, shape, None)
    rounds = plan_batch(batch, WINDOW, 3, config.sleep)
    assert len(graphs._slots) == len(rounds) == 6
    for r, slot in zip(rounds, graphs._slots.values(), strict=True):
        found = sum(t.numel() for t in slot._memory.values() if t.is_floating_point())
        counted = cuda_graph_bytes(model.config, r, WIDE) // WIDE
        assert found == counted if r.window else found < counted


def test_rounds_beyond_the_most_run_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_graphs, "MOST_ROUNDS", 2)
    recorder = Recorder()
    graphs = RoundGraphs(model := tiny_model(), recorder)
    found = steps(model, config_of(model, 2), graphs)
    assert_equal(found, steps(model := tiny_model(), config_of(model, 2), None))
    assert recorder.recorded == 4
    assert graphs.take() == "train.cuda_graphs: 2 rounds recorded, the most; all others run without graphs"


def test_a_step_whose_features_are_read_runs_without_graphs() -> None:
    model, recorder, read = tiny_model(), Recorder(), list[torch.Tensor]()
    graphs, shape = RoundGraphs(model, recorder), StepShape(1, WINDOW, 2)
    for on_features in (lambda r, layout, x: read.append(x), None, None):
        context = step_context(config_of(model, 1), shape, model, on_features=on_features, graphs=graphs)
        forward_backward(context, model, random_batch([[0] * 16] * 2), shape, None)
        assert recorder.recorded == 0 or on_features is None
    assert len(read) == 1 and recorder.recorded == 2


def test_other_trained_parameters_are_recorded_anew() -> None:
    model, recorder = tiny_model(), Recorder()
    graphs, shape, batch = RoundGraphs(model, recorder), StepShape(1, WINDOW, 2), random_batch([[0] * 16] * 2)
    frozen = model.blocks[1].mlp.up_proj.weight
    for trained, recorded in [(True, 0), (True, 2), (False, 2), (False, 4)]:
        frozen.requires_grad_(trained)
        model.zero_grad(set_to_none=True)
        forward_backward(step_context(config_of(model, 1), shape, model, graphs=graphs), model, batch, shape, None)
        assert recorder.recorded == recorded and (frozen.grad is not None) == trained


@pytest.mark.parametrize("few", [0, 40], ids=["at once", "kept rows"])
@pytest.mark.parametrize("changes", [{}, {"bptt_windows": 2, "micro_batch": 1}], ids=str)
def test_working_copies_and_gradients_keep_their_place(
    few: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bf16, but in fp64: products add to gradients of matrices, those of vectors are added up at the end.

    few: products with fewer rows wait until many can be multiplied; passes of two rows have 14 to 22.
    """
    monkeypatch.setattr(precision, "computing_in", lambda model, _: computing_in(model, torch.float64))
    monkeypatch.setitem(precision.DTYPES, "fp32", torch.float64)  # of the residual stream
    for name, value in {"FEW": few, "STACKED": 44, "LARGE": 1}.items():
        monkeypatch.setattr(row_stacks, name, value)
    taken = list[int]()
    take = RecordedRows.take
    monkeypatch.setattr(RecordedRows, "take", lambda rows: (taken.append(len(rows._counts)), take(rows)))
    outcomes = []
    for recorder in (None, Recorder()):
        model = tiny_model(norm="zero_centred", tie_embeddings=True)
        flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        parts = flat.split([p.numel() for p in model.parameters()])
        views = [part.view(p.shape) for part, p in zip(parts, model.parameters(), strict=True)]

        def zero_grad(set_to_none: bool = True, model=model, flat=flat, views=views) -> None:
            """As under ZeRO-1."""
            flat.zero_()
            for p, view in zip(model.parameters(), views, strict=True):
                p.grad = view

        monkeypatch.setattr(model, "zero_grad", zero_grad)
        config = config_of(model, 3, **changes)
        config.train.precision = "bf16"
        graphs = None if recorder is None else RoundGraphs(model, recorder)
        outcomes.append(steps(model, config, graphs))
        assert all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
    assert recorder is not None and recorder.replays > 0
    assert bool(few) == any(taken), "replays that keep rows"
    assert_equal(outcomes[1], outcomes[0])


def test_what_cannot_be_recorded_ends_with_the_name_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Recorder, function: object, pool: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(Recorder, "record", refuse)
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"pass 1 over window 1 .*is capturing\): .*train\.cuda_graphs=false"):
        steps(model, config_of(model, 1), RoundGraphs(model, Recorder()))


def test_it_needs_a_gpu() -> None:
    config = config_of(model := tiny_model(), 1)
    assert round_graphs.round_graphs(config, model) is None
    config.train.cuda_graphs = True
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs=true needs a CUDA device, and this run is on cpu"):
        round_graphs.round_graphs(config, model)
