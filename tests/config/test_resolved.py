"""A resolved configuration is read back unchanged, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.config import Config, config_diff, load_resolved, save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import CurriculumStage
from sleeptrain.errors import ConfigError


@pytest.mark.parametrize("experiment", ["stdlib", "rule110"])
def test_round_trip_of_the_experiments(tmp_path: Path, experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config


WORDS = ["1e3", "null", "yes", "0x10", "1_000", "2020-01-01", "é: #x", "multirun/a/b=1,c=[2]", "~"]


@pytest.mark.parametrize("name", WORDS)
def test_round_trip_of_words_that_yaml_could_read_as_something_else(tmp_path: Path, name: str) -> None:
    config = compose(["experiment=stdlib"])
    config.run.name = name
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml").run.name == name


def test_round_trip_keeps_numbers_and_stages(tmp_path: Path) -> None:
    config = compose(["experiment=stdlib"])
    config.optim.adamw_eps = 1e-300
    config.optim.muon_lr = 0.1 + 0.2
    config.optim.clip_norm = 2.0
    config.train.tokens = 2**62
    config.sleep.core = [0, 2]
    config.sleep.curriculum = [CurriculumStage(tokens=0, passes=2), CurriculumStage(tokens=7, window=64, batch=4)]
    save_resolved(config, tmp_path / "config.yaml")
    back = load_resolved(tmp_path / "config.yaml")
    assert back == config
    assert isinstance(back.sleep.curriculum[1], CurriculumStage) and isinstance(back.optim.clip_norm, float)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    save_resolved(compose(["experiment=stdlib"]), path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_resolved(compose(["experiment=rule110"]), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sleep: {pases: 4}", "pases"),
        ("sleep: {passes: many}", "many"),
        ("a: [", "config"),
        ("[1, 2]", "config"),
        ("run: " + "[" * 600, "nested deeper than 64 levels"),
        ("run: &r {name: a, more: *r}", "an alias in it refers to a part of the file that contains it"),
        ("\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 12))]), "aliases expand it"),
        ("run: {name: " + "a" * 2**18 + "}", "more than the 262,144 that are read"),
        ("train: {seed: " + "9" * 5000 + "}", "config"),
        ("run: !!python/object/apply:os.getcwd []", "constructor"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word) as refusal:
        load_resolved(path)
    assert str(path) in str(refusal.value)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_resolved(tmp_path / "absent.yaml")


def test_the_difference_lists_only_the_changed_settings() -> None:
    old, new = Config(), Config()
    assert config_diff(old, new) == []
    new.sleep.passes = 4
    new.model.attention.gate = False
    new.sleep.curriculum = [CurriculumStage(tokens=5, passes=2)]
    lines = config_diff(old, new)
    assert lines[:2] == ["model.attention.gate: True -> False", "sleep.passes: 1 -> 4"]
    assert len(lines) == 3 and lines[2].startswith("sleep.curriculum: [] -> [CurriculumStage(tokens=5, passes=2")
