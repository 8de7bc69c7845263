"""The examples of CONTRIBUTING.md do what the text says."""

from __future__ import annotations

import configparser
import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.config.ranges import check_section
from sleeptrain.config.setting import declared_settings, setting
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def block(language: str, after: str) -> str:
    """The first block of code in a language after a heading."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE.partition(after)[2], re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_a_package_brings_a_mixer_by_this_entry_point() -> None:
    [(group, entries)] = tomllib.loads(block("toml", "### A mixer"))["project"]["entry-points"].items()
    brought = configparser.ConfigParser()
    brought.read(next((ROOT / "tests/model/foreign").glob("*.dist-info")) / "entry_points.txt")
    assert dict(brought[group]) == entries


def test_the_command_with_that_mixer_makes_a_model() -> None:
    _, command, *overrides = shlex.split(block("sh", "### A mixer"))
    config = compose(overrides).model
    config.vocab_size = 4
    assert command == "plan" and Hybrid(config).blocks[0].mixer.config.num_heads == 4  # type: ignore[union-attr]


def test_a_setting_is_one_declaration() -> None:
    line = block("python", "### A setting")
    name, kind, value = re.fullmatch(r"(\w+): (\w+) = (.*)\n", line).groups()  # type: ignore[union-attr]
    assert kind == "int"
    section = dataclasses.make_dataclass("Section", [(name, int, eval(value, {"setting": setting}))])
    [(found, _, declared)] = declared_settings(section, "sleep.")
    assert found == "sleep.window" and declared.on_resume == "named"
    check_section(section(), "sleep.")
    with pytest.raises(ConfigError, match=r"sleep\.window must be at least 1, not 0"):
        check_section(section(0), "sleep.")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+(?:\.py|/))`", PAGE))))
def test_every_named_file_exists(path: str) -> None:
    assert any((ROOT / base / path).exists() for base in ("", "sleeptrain")), path
