"""Tables and help made from the declarations of the settings."""

from __future__ import annotations

import pytest

from sleeptrain.config.reference import HEAD, help_lines, with_tables
from sleeptrain.config.schema import Config
from sleeptrain.config.setting import declared_settings


def row(setting: str) -> str:
    section = setting.rpartition(".")[0]
    [found] = [
        line
        for line in with_tables(f"<!-- settings: {section} -->\n").splitlines()
        if line.startswith(f"| `{setting}`")
    ]
    return found


@pytest.mark.parametrize(
    ("setting", "default_and_allowed"),
    [
        ("run.name", "| required | a relative path |"),
        ("sleep.passes", "| `1` | >= 1 |"),
        ("sleep.eviction", "| `hard` | `hard`, `sliding` |"),
        ("sleep.core", "| `null` | [first, last) |"),
        ("sleep.sample_passes", "| `false` | `true`, `false` |"),
        ("model.attention.partial_rotary_factor", "| `0.5` | 0 to 1 |"),
        ("optim.adamw_betas", "| `[0.9, 0.95]` | two, 0 to below 1 |"),
        ("optim.muon_lr", "| `0.002` | > 0 |"),
        ("run.init_from", "| `\"\"` | a run's or a checkpoint's folder |"),
    ],
)
def test_defaults_and_allowed_values(setting: str, default_and_allowed: str) -> None:
    assert row(setting).startswith(f"| `{setting}` {default_and_allowed} ")


def test_a_table_replaces_the_old_one_and_nothing_else() -> None:
    page = "before\n<!-- settings: data.depo -->\n| old |\n| older |\n\n| another table |\n"
    written = with_tables(page)
    assert written.startswith(f"before\n<!-- settings: data.depo -->\n{HEAD}| `data.depo.nodes` |")
    assert written.endswith("\n\n| another table |\n") and "old" not in written.replace("held-out", "")
    assert with_tables(written) == written


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(KeyError, match="no section 'dta' of settings"):
        with_tables("<!-- settings: dta -->\n")


def test_the_help_describes_every_setting_without_markup() -> None:
    lines = list(help_lines())
    assert len(lines) == len(list(declared_settings(Config)))
    assert "  sleep.passes=1\n      N, the wake pass counted (>= 1)" in lines
    assert not any("`" in line or "](" in line for line in lines)
