"""Experiments read without hydra equal those that hydra composes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config import experiments
from sleeptrain.config.compose import compose
from sleeptrain.config.experiments import experiment_config, experiment_names
from sleeptrain.config.schema import Config

# A file based on another one, one with interpolations, one with variables of the environment.
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
def test_each_experiment_is_what_hydra_composes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = compose([f"experiment={name}"])
    config = read_without_hydra(name, monkeypatch)
    assert config == composed and repr(config) == repr(composed)  # repr tells 1 from 1.0


def test_hydra_composes_files_that_this_reader_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_, {experiment: null}]\n")
    (tmp_path / "experiment" / "odd.yaml").write_text("# @package model\ndim: 3\n")
    requests = []

    def composed(overrides: list[str]) -> Config:
        requests.append(overrides)
        return Config()

    monkeypatch.setattr(experiments, "config_dir", lambda: tmp_path)
    monkeypatch.setattr(experiments, "compose", composed)
    experiment_config.cache_clear()
    assert experiment_config("odd") == Config() and requests == [["experiment=odd"]]
    experiment_config.cache_clear()
