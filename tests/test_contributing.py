"""The examples of CONTRIBUTING.md, and of the pages on what can be added, do what the text says."""

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
CONTRIBUTING, MIXER = ((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "docs/how-to/new-mixer.md"))
PAGES = "".join(path.read_text() for path in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs/how-to").glob("new-*.md")])


def block(language: str, page: str, after: str = "") -> str:
    """The first block of code in a language on a page, after a heading."""
    found = re.search(
        rf"^```{language}\n(.*?)^```", page.partition(after)[2] if after else page, re.DOTALL | re.MULTILINE
    )
    assert found is not None
    return found[1]


def test_a_package_brings_a_mixer_by_this_entry_point() -> None:
    [(group, entries)] = tomllib.loads(block("toml", MIXER))["project"]["entry-points"].items()
    brought = configparser.ConfigParser()
    brought.read(next((ROOT / "tests/model/foreign").glob("*.dist-info")) / "entry_points.txt")
    assert dict(brought[group]) == entries


def test_the_command_with_that_mixer_makes_a_model() -> None:
    _, command, *overrides = shlex.split(block("sh", MIXER))
    config = compose(overrides).model
    config.vocab_size = 4
    assert command == "plan" and Hybrid(config).blocks[0].mixer.config.num_heads == 4  # type: ignore[union-attr]


def test_a_setting_is_one_declaration() -> None:
    line = block("python", CONTRIBUTING, "### A setting")
    name, kind, value = re.fullmatch(r"(\w+): (\w+) = (.*)\n", line).groups()  # type: ignore[union-attr]
    assert kind == "int"
    section = dataclasses.make_dataclass("Section", [(name, int, eval(value, {"setting": setting}))])
    [(found, _, declared)] = declared_settings(section, "sleep.")
    assert found == "sleep.window" and declared.on_resume == "named"
    check_section(section(), "sleep.")
    with pytest.raises(ConfigError, match=r"sleep\.window must be at least 1, not 0"):
        check_section(section(0), "sleep.")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+(?:\.py|/))`", PAGES))))
def test_every_named_file_exists(path: str) -> None:
    assert any((ROOT / base / path).exists() for base in ("", "sleeptrain")), path
