"""A mixer that only its own module knows is refused wherever something must be known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sleeptrain.config import ranges
from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.schema import Config, ParallelConfig, SleepConfig, TrainConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import FAMILIES, expressing
from sleeptrain.model import block
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import Recurrent
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.layout_check import check_layout
from sleeptrain.parallel.pipeline.stage_split import split_stages
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.plan.activations import Activations, carried_bytes, state_bytes
from sleeptrain.plan.layout import make_plan
from sleeptrain.plan.links import tensor_traffic
from sleeptrain.plan.workload import workloads
from sleeptrain.sleep.flops import layer_flops
from sleeptrain.sleep.rounds import Round
from tests.models import tiny_config

ROUND = Round(0, 0, 8, 1, (0,), loss=True, coda=True)


class Linear(nn.Module):
    """Linear attention, which the package lacks."""

    def __init__(self, config: Any, **parameters: tuple[int, ...]):
        super().__init__()
        self.out_proj = nn.Linear(config.dim, config.dim, bias=False)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, Recurrent]:
        return self.out_proj(x), Recurrent(x.new_zeros(x.shape[0], 1, 1, 1))


def config(kind: str = "linear", **parallel: int) -> Config:
    return Config(
        model=tiny_config([kind, "gated_deltanet"]),
        sleep=SleepConfig(window=8),
        train=TrainConfig(tokens=100),
        parallel=ParallelConfig(**parallel),
    )


def traffic(made: Config) -> Any:
    [work] = workloads(config("jet"), 1)
    return tensor_traffic(made, work, split_stages(config("jet"), 1), 0)


ASKED: dict[str, Callable[[Config], Any]] = {
    "work": lambda c: layer_flops(c.model, 0),
    "stages": lambda c: split_stages(c, 2),
    "memory": lambda c: Activations.of(c, True).block(0, ROUND, False),
    "casts": lambda c: Activations(c.model, 2, True, 1).casts(range(2), True),
    "state": lambda c: state_bytes(c.model, "linear"),
    "carried": lambda c: carried_bytes(c, workloads(config("jet"), 1)[0], c.model, "linear"),
    "sharding": lambda c: ModelSharding(c.model, 2),
    "communication": lambda c: traffic(config(tensor=2)),
    "matrices": lambda c: parameter_roles(Hybrid(c.model)),
    "plan": lambda c: make_plan(c, 1, None, 0.4),
    **{f"names in {name}": lambda c, f=family: f.links(c.model) for name, family in FAMILIES.items()},
}


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one who adds a mixer begins: a module, and its name in both lists of mixers."""
    monkeypatch.setitem(block.MIXERS, "linear", Linear)
    monkeypatch.setattr(ranges, "MIXERS", (*ranges.MIXERS, "linear"))


@pytest.mark.usefixtures("brought")
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_an_unknown_mixer_is_never_taken_for_another(ask: Callable[[Config], Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers: .* of the mixer 'linear' is not known, only that of "):
        ask(config())


@pytest.mark.usefixtures("brought")
def test_no_family_has_it() -> None:
    assert expressing(config().model) == []


@pytest.mark.usefixtures("brought")
def test_it_is_not_cut_over_tensor_ranks() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor \(2\) does not go with model\.layers \(linear\); .* be 1"):
        check_layout(config(tensor=2), 2)


@pytest.mark.usefixtures("brought")
def test_how_its_parameters_begin_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Hybrid(config().model).init_weights(0)  # a linear layer's matrix begins as every other
    monkeypatch.setitem(block.MIXERS, "linear", lambda c: Linear(c, feature_map=(3, 5)))
    with pytest.raises(ConfigError, match=r"model\.layers: how blocks\.0\.mixer\.feature_map \[3, 5\] of the mixer"):
        Hybrid(config().model).init_weights(0)


def test_without_a_module_there_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers: the module of the mixer 'linear' is not known"):
        Hybrid(config().model)


def test_a_table_gives_what_it_has() -> None:
    assert of_mixer({"jet": 3}, "jet", "the number") == 3
