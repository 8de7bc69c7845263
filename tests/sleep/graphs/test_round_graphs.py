"""A step with graphs equals one without, in fp64. What is recorded is run again on the same memory: no GPU is here."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.config.schema import Config, SleepConfig, TrainConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.graphs import round_graphs
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.step import StepResult, forward_backward, step_context
from tests.models import random_batch, tiny_model
from tests.sleep.graphs.recorder import Recorder

WINDOW = 16
# Two rows of 40 tokens, the last window of which is short: documents end at other places in each step.
TEXTS = [
    [[0] * 5 + [1] * 27 + [2] * 8, [3] * 40],
    [[0] * 6 + [1] * 26 + [2] * 8, [3] * 40],
    [[0] * 9 + [1] * 11 + [2] * 9 + [3] * 11, [4] * 18 + [5] * 22],
    [[0] * 3 + [1] * 29 + [2] * 8, [3] * 40],
    [[0] * 9 + [1] * 11 + [2] * 9 + [3] * 11, [4] * 17 + [5] * 23],
]


def batches() -> list[Batch]:
    carried = [[i > 0, False] for i in range(len(TEXTS))]
    return [
        random_batch(text, seed, 0.8, continues=[True, False], carried=carried[seed]) for seed, text in enumerate(TEXTS)
    ]


def config_of(model: Hybrid, passes: int, **changes: object) -> Config:
    sleep = SleepConfig(passes=passes, window=WINDOW, recompute="none", **changes)  # type: ignore[arg-type]
    return Config(model=model.config, sleep=sleep, train=TrainConfig(tokens=1))


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
                p.sub_(g, alpha=0.01)
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
        (2, {"bptt_windows": 1}),
    ],
    ids=str,
)
def test_steps_equal_those_without_graphs(passes: int, changes: dict[str, object]) -> None:
    recorder = Recorder()
    expected = steps(model := tiny_model(), config_of(model, passes, **changes), None)
    graphs = RoundGraphs(model := tiny_model(), recorder)
    found = steps(model, config_of(model, passes, **changes), graphs)
    assert_equal(found, expected)
    assert recorder.replays > recorder.recorded > 0
