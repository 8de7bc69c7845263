"""A mixer without a declaration is refused wherever its properties are read. It is never taken for another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sleeptrain.config.mixers import is_recurrent, mixer_names, of_mixer
from sleeptrain.config.schema import Config, ParallelConfig, SleepConfig, TrainConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import FAMILIES, expressing
from sleeptrain.model.document_layout import window_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.mixers.registry import mixer_spec, spec_class
from sleeptrain.model.mixers.spec import Draw
from sleeptrain.model.state import HARD, Recurrent
from sleeptrain.optim.param_groups import parameter_roles
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


USES: dict[str, Callable[[Config], Any]] = {
    "work": lambda c: layer_flops(c.model, 0),
    "stages": lambda c: split_stages(c, 2),
    "memory": lambda c: Activations.of(c, True).block(0, ROUND, False),
    "copies": lambda c: Activations(c.model, 2, 4, True, 1, 1).copies(range(2), 100),
    "state": lambda c: state_bytes(c.model, "linear"),
    "carried": lambda c: carried_bytes(c, workloads(config("jet"), 1)[0], c.model, "linear"),
    "sharding": lambda c: ModelSharding(c.model, 2),
    "communication": lambda c: traffic(config(tensor=2)),
    "matrices": lambda c: parameter_roles(Hybrid(c.model)),
    "plan": lambda c: make_plan(c, 1, None, 0.4),
    **{f"names in {name}": lambda c, f=family: f.mappings(c.model) for name, family in FAMILIES.items()},
}


@pytest.mark.parametrize("ask", USES.values(), ids=USES)
def test_an_unknown_mixer_is_refused(ask: Callable[[Config], Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers: .*mixer 'linear'"):
        ask(config())


def test_no_family_expresses_an_unknown_mixer() -> None:
    assert expressing(config().model) == []


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"unknown mixer 'gated_delta_net'; did you mean 'gated_deltanet'\?"):
        Hybrid(tiny_config(["gated_delta_net"]))


@pytest.mark.parametrize("kind", mixer_names())
def test_every_mixer_has_a_complete_spec(kind: str) -> None:
    """The spec agrees with the module: the parameters of its sharding, the shapes of its initial values and of S."""
    model = tiny_config([kind])
    spec, mixer = mixer_spec(model, kind), spec_class(kind).module(model)
    assert set(spec.sharding()) == {name for name, _ in mixer.named_parameters()}
    assert spec.recurrent == is_recurrent(kind)
    for name, parameter in mixer.named_parameters():
        initial = spec.initial_weight(name, Draw(f"blocks.0.mixer.{name}", tuple(parameter.shape), 0))
        assert initial is None or initial.shape == parameter.shape
    layers = {name for name, part in mixer.named_modules() if isinstance(part, torch.nn.Linear)}
    assert layers == {*spec.state_layers, *spec.feature_layers}
    layout = window_layout(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.bool))
    _, state = mixer(torch.zeros(2, 8, model.dim), None, layout, HARD)
    if isinstance(state, Recurrent):
        assert tuple(state.S_BHKV.shape) == (2, *spec.state_shape)
    else:
        assert spec.state_shape == (0, 0, 0) and not spec.recurrent


def test_a_table_gives_the_entry_of_a_mixer() -> None:
    assert of_mixer({"jet": 3}, "jet", "the number") == 3
