"""The command of a run composes to its settings."""

from __future__ import annotations

import shlex

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.report.repeat import repeat_command
from tests.configs import change
from tests.report.made import composed


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["experiment=rule110", "sleep.passes=4", "train.seed=3"], "n4-seed0"),
        (["experiment=rule110_t32_n3", "sleep.core=[1,2]"], "multirun/x/sleep.core=[1,2],a=b"),
        (["experiment=depo_small", "optim.clip_norm=1e-09", "run.allow_changes=[optim.clip_norm]"], "null"),
        (["experiment=stdlib", "sleep.sample_passes=true", "train.max_time=null"], 'it\'s "quoted"'),
        (["experiment=stdlib", "train.seed=1"], '${oc.env:HOME}/\\${x}/é/"\\'),
        (["experiment=stdlib", "train.seed=2"], "é"),
        (["experiment=stdlib", "sleep.curriculum=[{tokens: 1_000, passes: 4}]"], "1"),
    ],
)
def test_it_composes_to_the_same(overrides: list[str], name: str) -> None:
    config = change(compose(overrides), {"run.name": name, "model.vocab_size": 11})
    command = repeat_command(config)
    assert command is not None
    program, train, *rest = shlex.split(command)
    assert (program, train) == ("sleeptrain", "train") and compose(rest) == config


def test_the_nearest_experiment_is_taken() -> None:
    near = repeat_command(composed("experiment=rule110_t32_n4", "sleep.passes=4", "run.name=mine"))
    assert near is not None and near.startswith("sleeptrain train experiment=rule110_t32_n4 run.name=mine ")
    assert "passes" not in near and "layers" not in near


def test_settings_that_no_command_gives_have_none() -> None:
    assert repeat_command(change(composed(), {"sleep.passes": 0})) is None
