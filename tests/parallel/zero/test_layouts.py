"""ZeRO together with tensor and pipeline ranks, against one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sleeptrain.distributed.mesh import Axis, Mesh
from sleeptrain.optim import muon
from sleeptrain.optim.optimizers import Optimizers, ParameterRole
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.zero.engine import wrap
from tests.parallel.processes import run_ranks
from tests.parallel.zero import cases
from tests.parallel.zero.test_engine import assert_equal, slow, untied

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.parametrize(
    ("world", "zero", "pieces"),
    [
        slow(2, 1, cases.whole_rounds),
        (4, 1, cases.window_by_window),
        slow(4, 2, cases.whole_rounds),
        slow(4, 2, cases.window_by_window),
        slow(4, 3, cases.whole_rounds),
    ],
)
def test_two_tensor_ranks_equal_one_process(world: int, zero: int, pieces: Any) -> None:
    run = partial(cases.data_parallel, zero, pieces, tensor=2)
    assert_equal(run_ranks(run, world), cases.single_process())


def test_an_untied_head_over_tensor_ranks() -> None:
    """The vocabulary is no multiple of the ranks: the last part is padded."""
    run = partial(cases.data_parallel, 1, cases.whole_rounds, untied, tensor=2)
    assert_equal(run_ranks(run, 2), cases.single_process(untied))


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2, 1)), ((2, 1), (4, 2)), slow((2, 2), (2, 1))])
def test_a_checkpoint_goes_on_with_other_tensor_ranks(before: tuple[int, int], after: tuple[int, int]) -> None:
    """(processes, tensor ranks) before and after."""
    saved = run_ranks(partial(cases.data_parallel, 1, steps=range(2), tensor=before[1]), before[0])[0]
    state = {"model": saved["model"], "optim": saved["optim"]}
    go_on = partial(cases.data_parallel, 2, make=lambda: cases.small_model(9), steps=[2], saved=state, tensor=after[1])
    wanted = cases.single_process()
    for key in ("losses", "norms"):
        wanted[key] = wanted[key][2:]
    assert_equal(run_ranks(go_on, after[0]), wanted)


def test_each_matrix_is_orthogonalised_once_over_all_tensor_and_data_ranks() -> None:
    def run() -> int:
        counted: list[int] = []
        plain = muon.newton_schulz
        muon.newton_schulz = lambda G: counted.append(G.shape[0]) or plain(G)  # type: ignore[func-returns-value]
        cases.data_parallel(1, steps=[0], tensor=2)
        return sum(counted)

    roles = parameter_roles(cases.small_model())
    counts = run_ranks(run, 4)
    assert sum(counts) == sum(len(role.blocks or (1,)) for role in roles.values() if role.kind == "muon")
    assert all(counts)


class Stage(nn.Module):
    """A stage whose loss needs no other stage, so that only the norm and the clipping connect them."""

    def __init__(self, stage: int):
        super().__init__()
        torch.manual_seed(stage)
        self.add_module(f"linear{stage}", nn.Linear(5 + stage, 7))

    def loss(self, rows: range) -> torch.Tensor:
        (linear,) = self.children()
        assert isinstance(linear, nn.Linear)
        generator = torch.Generator().manual_seed(linear.in_features)
        x_BD = torch.randn(4, linear.in_features, generator=generator)[rows.start : rows.stop]
        return torch.tanh(linear(x_BD)).square().sum()


STAGE_ROLES = {
    f"linear{s}.{leaf}": ParameterRole(kind, kind == "muon")
    for s in (0, 1)
    for leaf, kind in (("weight", "muon"), ("bias", "adamw"))
}


@pytest.mark.parametrize("zero", [1, slow(2)])
def test_the_norm_is_that_of_all_stages(zero: int) -> None:
    def run() -> dict[str, Any]:
        mesh = Mesh.build(1, 2)
        engine = wrap(Stage(mesh.pipeline.rank), STAGE_ROLES, cases.OPTIM, zero, mesh)
        rows, norms = range(2 * mesh.data.rank, 2 * mesh.data.rank + 2), []
        for rate in cases.RATES:
            engine.backward(engine.forward(lambda model: model.loss(rows)))
            norms.append(engine.step(rate))
        return {"norms": norms, "model": (cases.stage_state(engine) or {"model": {}})["model"]}

    stages = [Stage(0), Stage(1)]
    parameters = {name: p for stage in stages for name, p in stage.named_parameters()}
    optim, wanted = Optimizers(STAGE_ROLES, parameters, cases.OPTIM), []
    for rate in cases.RATES:
        optim.zero_grad()
        sum(stage.loss(range(4)) for stage in stages).backward()
        wanted.append(float(optim.clip(cases.OPTIM.clip_norm)))
        optim.step(rate)
    results = run_ranks(run, 4)
    assert all(r["norms"] == pytest.approx(wanted, rel=2e-6) for r in results)
    found = {name: tensor for r in results for name, tensor in r["model"].items()}
    assert cases.largest_difference(found, {n: p.detach() for n, p in parameters.items()}) < 2e-6


def test_tensor_ranks_without_their_sharding_are_refused() -> None:
    model = cases.small_model()
    with pytest.raises(ValueError, match="whole_shapes"):
        wrap(model, parameter_roles(model), cases.OPTIM, 1, Mesh(Axis(2), Axis(), Axis()))
