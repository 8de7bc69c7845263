"""The shell and hydra's grammar do not change the words of a printed command line."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.config.compose import compose
from sleeptrain.config.overrides import override, shell_command

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "plain-name_1/with.dots", "my run, a=b é's", 'a"b\\', "\\\\", "\\'", '\\"', "$HOME `id` !! ~ * ?", "漢 字", "null",
    "NULL", "True", "1e5", "2026_07_20", "-x", "#x", "", " lead ", "tab\tand\nline", "[a]{b}(c):d", "choice(1,2)",
    "%3d",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_string_is_read_back(name: str) -> None:
    program, word, end = shlex.split(shell_command("train", override("run.root", name), "..."))
    assert (program, end) == ("train", "...")
    assert compose(["experiment=rule110", word]).run.root == name


def test_a_shell_splits_the_printed_words() -> None:
    words = [override("run.root", name) for name in NAMES]
    printed = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {shell_command(*words)}"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize(
    ("name", "value", "at"),
    [
        ("train.max_time", None, "train.max_time"),
        ("sleep.core", [1, 2], "sleep.core"),
        ("optim.muon_lr", 1e-09, "optim.muon_lr"),
        ("sleep.sample_passes", True, "sleep.sample_passes"),
        ("data.shards.sources", [{"name": "a, b", "train": "é=1", "weight": 0.5}], "data.shards.sources"),
    ],
)
def test_other_values(name: str, value: Any, at: str) -> None:
    config = compose(["experiment=rule110", "sleep.passes=2", override(name, value)])
    found: Any = config
    for part in at.split("."):
        found = getattr(found, part)
    if isinstance(value, list) and isinstance(value[0], dict):
        found = [{key: getattr(item, key) for key in value[0]} for item in found]
    assert found == value


def test_no_other_module_quotes_for_a_shell() -> None:
    """Each printed command is quoted in the one way that is tested. local_slurm.py does not import the package."""
    files = [*(ROOT / "sleeptrain").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    quoting = [path.name for path in files if re.search(r"^\s*(import|from) shlex", path.read_text(), re.M)]
    assert quoting == ["overrides.py", "local_slurm.py"]
