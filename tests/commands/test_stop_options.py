"""Options that replace the stop rule of a run."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from sleeptrain.commands.stop_options import NAMES, add_stop_options, stop_settings
from sleeptrain.config.schema import SleepConfig


def settings(*arguments: str) -> dict[str, object]:
    root = ArgumentParser()
    add_stop_options(root)
    return stop_settings(root.parse_args(arguments))


def test_only_what_is_given_is_replaced() -> None:
    assert settings() == {}
    assert settings("--stop", "fixed", "--min-passes", "2") == {"stop": "fixed", "min_passes": 2}
    given = settings("--stop", "gate", "--stop-gate", "g", "--stop-threshold", "0", "--min-passes", "1")
    assert given == {"stop": "gate", "stop_gate": "g", "stop_threshold": 0.0, "min_passes": 1}


def test_each_option_is_a_setting_of_sleep() -> None:
    assert all(hasattr(SleepConfig(), name) for name in NAMES)


def test_an_unknown_rule_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--stop", "never")
    assert "never" in capsys.readouterr().err
