"""The command of a run composes to its settings."""

from __future__ import annotations

import shlex

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.report.repeat import repeat_command
from tests.configs import change
from tests.report.made import composed


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=rule110", "run.name=n4-seed0", "sleep.passes=4", "train.seed=3"],
        ["experiment=rule110_t32_n3", "run.name=multirun/x/sleep.core=[1,2],a=b", "sleep.core=[1,2]"],
        [
            "experiment=depo_small",
            "optim.clip_norm=1e-09",
            "train.max_time=null",
            "run.allow_changes=[optim.clip_norm]",
        ],
        ["experiment=stdlib", 'run.name=it\'s \\"quoted\\"', "sleep.sample_passes=true"],
        ["experiment=stdlib", "sleep.curriculum=[{tokens: 1_000, passes: 4}]", "train.max_time=null", "run.name='1'"],
    ],
)
def test_it_composes_to_the_same(overrides: list[str]) -> None:
    config = compose(overrides)
    config.model.vocab_size = 11
    command = repeat_command(config)
    assert command is not None
    program, name, *rest = shlex.split(command)
    assert (program, name) == ("sleeptrain", "train") and compose(rest) == config


def test_the_nearest_experiment_is_taken() -> None:
    near = repeat_command(composed("experiment=rule110_t32_n4", "run.name=mine"))
    assert near is not None and near.startswith("sleeptrain train experiment=rule110_t32_n4 run.name=mine ")
    assert "passes" not in near and "layers" not in near


def test_what_no_command_leads_to_has_none() -> None:
    assert repeat_command(change(composed(), {"sleep.passes": 0})) is None
