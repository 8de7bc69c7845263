"""Values that a setting's declaration does not allow are refused by the setting's name."""

from __future__ import annotations

import dataclasses

import pytest

from sleeptrain.config import Config, validate
from sleeptrain.config.ranges import check_ranges, check_section, settings
from sleeptrain.config.schema import SleepConfig
from sleeptrain.config.setting import declared_settings
from sleeptrain.errors import ConfigError
from tests.config.test_validate import shards
from tests.configs import change


def test_settings_have_dotted_names_and_lists_are_one() -> None:
    found = dict(settings(Config()))
    assert found["sleep.passes"] == 1 and found["data.rule110.width"] == 20
    assert found["model.layers"] == Config().model.layers
    assert not {"sleep", "data.rule110"} & set(found)


def test_a_setting_divides_another() -> None:
    check_ranges(shards())
    with pytest.raises(ConfigError, match=r"^model\.mamba2\.num_heads \(8\) must be a multiple of .*num_groups \(3\)$"):
        check_ranges(change(shards(), {"model.mamba2.num_groups": 3}))


def test_a_section_alone_is_checked_under_its_prefix() -> None:
    check_section(SleepConfig(), "sleep.")
    with pytest.raises(ConfigError, match=r"^sleep\.passes must be at least 1, not 0$"):
        check_section(SleepConfig(passes=0), "sleep.")
    with pytest.raises(ConfigError, match=r"^passes must be at least 1"):
        check_section(SleepConfig(passes=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_must_be_finite(value: float) -> None:
    config = shards()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, norm_eps=value))
    with pytest.raises(ConfigError, match=r"^model\.norm_eps must be a finite number, not"):
        check_ranges(config)


def test_an_unknown_value_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'keller_jordan'"):
        validate(change(shards(), {"optim.muon_scaling": "keler_jordan"}))


def test_every_number_is_checked() -> None:
    """A new number in the schema needs bounds."""
    unbounded = {name for name, _, s in declared_settings(Config) if s.at_least is None and s.above is None}
    numbers = {name for name, value in settings(shards()) if type(value) in (int, float)}
    assert numbers & unbounded == {"optim.muon_momentum"}  # checked by `validate`
