"""The norms of memory and features are the same in a plain loop and in every recompute mode and layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.data.batch import PAD
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.health.norms import Norms
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.rounds import Round
from sleeptrain.sleep.step import forward_backward, step_context
from sleeptrain.watch.progress import Progress
from tests.models import random_batch, tiny_model
from tests.parallel.test_train import layout, records, text, train
from tests.sleep.test_step import SHAPE, config
from tests.train.conftest import tiny_shards

__all__ = ["tiny_shards"]  # this module uses the fixture, too

ONE = World(Mesh.single(), torch.device("cpu"))
# Documents that go on, one that ends in the second window, pads at a row's end and a row of nothing else; some windows
# have no target.
DOCUMENTS = [[0] * 13, [0] * 5 + [1] * 8, [0] * 9 + [PAD] * 4, [0] * 13, [PAD] * 13]
CONTINUES = [True, False, False, True, False]
TARGETS = 0.2


def measured(**changes: object) -> dict[str, dict[str, float]]:
    model, batch, here = (
        tiny_model(),
        random_batch(DOCUMENTS, target_share=TARGETS, continues_B=CONTINUES),
        Progress(),
    )
    norms = Norms(here)
    settings = config(**changes)
    context = step_context(settings, SHAPE, model, here, norms.on_features)
    result = forward_backward(context, model, batch, SHAPE, None)
    return norms.record(result.state, SHAPE.passes, ONE)


def by_hand() -> dict[str, dict[str, float]]:
    """Computes the norms from the outputs of the last block, and from the state of the rows that hold any."""
    model, batch = tiny_model(), random_batch(DOCUMENTS, target_share=TARGETS, continues_B=CONTINUES)
    current: list[Round] = []
    numbers: dict[int, list[torch.Tensor]] = {}

    def hook(module: Any, inputs: Any, output: Any) -> None:
        r = current[-1]
        if output[0] is None:
            return
        for row, x_LD in zip(r.rows, output[0].detach(), strict=True):
            documents = batch.documents_BT[row, r.start : r.stop]
            selected = documents != PAD
            if not r.is_wake:
                selected &= documents == documents[selected][-1]
            numbers.setdefault(r.pass_index, []).append(x_LD[selected].flatten())

    model.blocks[2].register_forward_hook(hook)
    context = step_context(config(), SHAPE, model)
    context = replace(context, settings=replace(context.settings, on_round=current.append))
    state = forward_backward(context, model, batch, SHAPE, None).state
    features = {f"pass{n}": float(torch.cat(x).square().mean().sqrt()) for n, x in numbers.items()}
    memory = {}
    for layer in (1, 2):
        S = state[layer].S_BHKV  # type: ignore[union-attr]
        rows = torch.stack([row for row in S if bool(row.any())])
        memory[f"layer{layer}"] = float(rows.square().mean().sqrt())
    return {"S": memory, "features": features}


def assert_close(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]], rel: float) -> None:
    assert {kind: set(values) for kind, values in found.items()} == {k: set(v) for k, v in expected.items()}
    for kind, values in expected.items():
        assert found[kind] == pytest.approx(values, rel=rel), kind


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__micro_batch": 2, "sleep__bptt_windows": 1},
        {"sleep__recompute": "pass"},
        {"sleep__recompute": "window"},
        {"sleep__recompute": "block"},
    ],
    ids=str,
)
def test_norms_equal_those_of_a_plain_loop(changes: dict[str, object]) -> None:
    expected = by_hand()
    assert set(expected["features"]) == {"pass1", "pass2"}, "the last pass leaves no features"
    assert_close(measured(**changes), expected, rel=1e-12)


def test_a_layer_that_holds_nothing_is_left_out() -> None:
    assert Norms(Progress()).record(FastWeights((None, None)), 2, ONE) == {"S": {}, "features": {}}


def norms(folder: Path) -> list[dict[str, dict[str, float]]]:
    return [r["norms"] for r in records(folder) if "norms" in r]


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(
    ("spread", "more", "ranks"),
    [
        pytest.param(layout(1, 2, 1), (), 4, marks=pytest.mark.slow),
        pytest.param(layout(2, 1, 1), ("parallel.sequence=true",), 2, marks=pytest.mark.slow),
    ],
    ids=["stages of replicas", "tensor ranks with split tokens"],
)
def test_norms_are_the_same_in_every_layout(
    tmp_path: Path, tiny_shards: tuple[str, ...], spread: tuple[str, ...], more: tuple[str, ...], ranks: int
) -> None:
    every = (*text(tiny_shards), "health.norms_every=2", "sleep.core=[1,3]", "sleep.passes=3")
    train(tmp_path / "one", *every)
    train(tmp_path / "many", *every, *spread, *more, ranks=ranks)
    (one,) = norms(tmp_path / "one")
    (found,) = norms(tmp_path / "many")
    assert [r["step"] for r in records(tmp_path / "many") if "norms" in r] == [2]
    assert set(one["S"]) == {"layer0", "layer2", "layer3"} and set(one["features"]) == {"pass1", "pass2", "pass3"}
    assert_close(found, one, rel=1e-4)
