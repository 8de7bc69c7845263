from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.ops import fla_package


def refuse(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_package.importlib, "import_module", refuse)
    for call in (lambda: fla_package.from_fla("fla.ops", "name"), fla_package.load_kernels):
        with pytest.raises(ConfigError, match=r"'fla'.*sleeptrain\[gpu\]"):
            call()


@pytest.mark.parametrize(("value", "kept"), [(None, "0"), ("1", "1")])
def test_replacements_of_the_kernels_are_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str | None, kept: str
) -> None:
    monkeypatch.setattr(fla_package.importlib, "import_module", lambda name: SimpleNamespace(kernel=3))
    for switch in fla_package.REPLACEMENTS:
        monkeypatch.setenv(switch, value or "")
        if value is None:
            monkeypatch.delenv(switch)
    assert fla_package.from_fla("fla.ops", "kernel") == 3
    assert {os.environ[switch] for switch in fla_package.REPLACEMENTS} == {kept}


def test_an_implementation_runs_on_the_device_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.Tensor] = []

    class Device:
        def __init__(self, x: torch.Tensor):
            self.x = x

        def __enter__(self) -> None:
            current.append(self.x)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    x = torch.zeros(1)
    assert fla_package.on_its_device(lambda x, y: (current[:], y))(x, y=2) == ([x], 2)
    assert not current
