"""Experiments that are read without hydra are what hydra composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config import experiments
from sleeptrain.config.compose import compose
from sleeptrain.config.experiments import experiment_config, experiment_names
from sleeptrain.config.schema import Config

# One of each kind of file: of a chain, with interpolations, with variables of the environment.
SOME = ("rule110_t32_n1", "continue_ouro_1_4b", "stdlib")


def read_without_hydra(name: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    def refuse(overrides: list[str]) -> Config:
        raise AssertionError(f"hydra composes {overrides}")

    monkeypatch.setattr(experiments, "compose", refuse)
    experiment_config.cache_clear()
    return experiment_config(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in experiment_names()]
)
def test_each_is_what_hydra_composes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = compose([f"experiment={name}"])
    read = read_without_hydra(name, monkeypatch)
    assert read == composed and repr(read) == repr(composed)  # also 1 and 1.0 differ


def test_what_only_hydra_knows_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_, {experiment: null}]\n")
    (tmp_path / "experiment" / "odd.yaml").write_text("# @package model\ndim: 3\n")
    asked = []

    def composed(overrides: list[str]) -> Config:
        asked.append(overrides)
        return Config()

    monkeypatch.setattr(experiments, "config_dir", lambda: tmp_path)
    monkeypatch.setattr(experiments, "compose", composed)
    experiment_config.cache_clear()
    assert experiment_config("odd") == Config() and asked == [["experiment=odd"]]
    experiment_config.cache_clear()
