"""The declaration of a setting: what it allows, and where it is found."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sleeptrain.config.setting import Setting, declared_settings, setting


@dataclass
class Inner:
    size: int = setting(3, "its size", at_least=1, on_resume="fixed")


@dataclass
class Outer:
    names: list[str] = setting(["a"], "names")
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("declared", "value", "fault"),
    [
        (Setting("", at_least=1), 1, None),
        (Setting("", at_least=1), 0, "must be at least 1, not 0"),
        (Setting("", above=0), 1e-9, None),
        (Setting("", above=0), 0.0, "must be greater than 0, not 0.0"),
        (Setting("", at_least=0, at_most=0.5), 0.5, None),
        (Setting("", at_least=0, at_most=0.5), 0.6, "must lie between 0 and 0.5, not 0.6"),
        (Setting("", at_least=0, at_most=0.5), -1, "must lie between 0 and 0.5, not -1"),
        (Setting("", at_least=1), None, None),
        (Setting(""), -1, None),
    ],
)
def test_faults(declared: Setting, value: float | None, fault: str | None) -> None:
    assert declared.fault(value) == fault


def test_declarations_of_sections_have_dotted_names() -> None:
    (names, _, first), (size, found, second) = declared_settings(Outer, "run.")
    assert (names, size, found.default) == ("run.names", "run.inner.size", 3)
    assert (first, second) == (Setting("names"), Setting("its size", at_least=1, on_resume="fixed"))


def test_a_list_is_not_shared() -> None:
    Outer().names.append("b")
    assert Outer().names == ["a"]
