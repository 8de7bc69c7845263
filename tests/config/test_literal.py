"""`${...}` is text in a file that is read literally, whatever precedes it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from sleeptrain.config.literal import escaped, literal, read_yaml, write_yaml
from sleeptrain.config.schema import ShardSource

TEXTS = ["", "a", "${oc.env:HOME}", r"\${x}", r"\\${x}", "a$b{c}", "$${x}", "${", "3:55:00", "1e3", "null", "é\n#: '\""]


@pytest.mark.parametrize("text", TEXTS)
def test_omegaconf_reads_an_escaped_text_unchanged(text: str) -> None:
    config = OmegaConf.create(escaped({"list": [text], "map": {"key": text}}))
    assert OmegaConf.to_container(config, resolve=True) == {"list": [text], "map": {"key": text}}


def test_values_other_than_text_stay() -> None:
    assert escaped({"a": [1, None, {"b": 2.5}], "c": True}) == {"a": [1, None, {"b": 2.5}], "c": True}


@pytest.mark.parametrize("text", TEXTS)
def test_a_written_file_is_read_back(text: str) -> None:
    values = {"name": text, "more": [text, 1, None, 2.5, True]}
    assert read_yaml(write_yaml(values)) == values


def test_numbers_are_read_as_omegaconf_reads_them() -> None:
    assert read_yaml(b"a: 1e3\nb: 1_000\nc: .5\nd: yes\n") == {"a": 1000.0, "b": 1000, "c": 0.5, "d": True}


def test_a_section_has_the_values_and_its_defaults() -> None:
    assert literal(ShardSource, {"train": "${x}"}) == ShardSource(train="${x}")
