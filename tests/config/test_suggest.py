"""Hints about unknown names."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import Config
from sleeptrain.config.suggest import setting_names, suggest, suggest_setting


def test_the_nearest_name_comes_before_all_names() -> None:
    assert suggest("hrad", ["hard", "sliding"]) == "did you mean 'hard'? (allowed: hard, sliding)"
    assert suggest("xyz", ["hard", "sliding"]) == "allowed: hard, sliding"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("passes", "did you mean 'sleep.passes'?"),
        ("train.passes", "did you mean 'sleep.passes'?"),
        ("sleep.pases", "did you mean 'sleep.passes'?"),
        ("optim.lr", "did you mean 'optim.muon_lr' or 'optim.adamw_lr' or 'optim.min_lr_ratio'?"),
        ("experment", "did you mean 'experiment'?"),
        ("none.xyz", "`sleeptrain train --help` lists the settings"),
    ],
)
def test_hints_about_settings(name: str, hint: str) -> None:
    assert suggest_setting(name, Config, ["experiment"]) == hint


def test_where_nothing_is_near_the_section_is_listed() -> None:
    assert suggest_setting("data.rule110.xyz", Config).startswith(
        "data.rule110 has width, strings, steps, mixed_steps, boundary"
    )
    assert suggest_setting("xyz", Config).startswith("a setting begins with one of run, model, sleep")


def test_names_are_those_of_sections_and_settings_in_order() -> None:
    names = setting_names(Config)
    assert names.index("sleep") + 1 == names.index("sleep.passes")
    assert {"data.rule110", "data.rule110.width", "sleep.curriculum"} <= set(names)
    assert not any(name.startswith("sleep.curriculum.") for name in names)
