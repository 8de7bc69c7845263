from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from sleeptrain.doctor import packages
from sleeptrain.doctor.device import check_torch
from sleeptrain.doctor.finding import FAILED, OK
from tests.doctor.cases import alone

Pretend = Callable[[dict[str, str | None]], None]
DECLARED = [
    "hydra-core>=1.3.2,<1.4",
    "torch>=2.13.0a0,<2.14",
    "colorama; sys_platform == 'none'",
    "megatron-core>=0.16.1,<0.17; extra == 'parallel'",
    "ruff>=0.9; extra == 'dev'",
    "transformers>=5.23,<5.25; extra == 'hf'",
    "sleeptrain[hf]; extra == 'dev'",
]
GOOD: dict[str, str | None] = {
    "hydra-core": "1.3.8",
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "ruff": "0.1",
    "transformers": "5.23.0",
    "triton": None,
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Replaces the installed versions, and the requirements of this package."""

    def install(versions: dict[str, str | None]) -> None:
        have = GOOD | versions

        def version(name: str) -> str:
            if (known := have[name]) is None:
                raise metadata.PackageNotFoundError(name)
            return known

        monkeypatch.setattr(metadata, "version", version)
        requirements = {"sleeptrain": DECLARED, "torch": ["triton==3.9.0; sys_platform != 'none'"]}
        monkeypatch.setattr(metadata, "requires", requirements.__getitem__)

    install({})
    return install


def test_this_installation_is_as_declared(tmp_path: Path) -> None:
    for check in (packages.check_python, packages.check_packages, packages.check_optional_packages, check_torch):
        assert check(alone(tmp_path)).state == OK


def test_the_ranges_are_those_of_the_projects_own_file() -> None:
    declared = {r.name for r in packages.requirements("")}
    assert {"torch", "hydra-core", "webdataset"} <= declared and "deepspeed" not in declared
    assert {r.name for r in packages.requirements("parallel")} == {"megatron-core", "deepspeed"}


def test_another_python_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.2")
    finding = packages.check_python(alone(tmp_path))
    assert finding.state == FAILED and "3.9.2" in finding.found and "PYTHON=" in finding.cure


@pytest.mark.parametrize("version", ["1.4.0", "1.3.1", None])
def test_a_package_of_every_run(tmp_path: Path, pretend: Pretend, version: str | None) -> None:
    assert packages.check_packages(alone(tmp_path)).state == OK
    pretend({"hydra-core": version})
    finding = packages.check_packages(alone(tmp_path))
    assert finding.state == FAILED and "hydra-core" in finding.found
    assert finding.cure == "pip install 'hydra-core<1.4,>=1.3.2'"


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("megatron-core", "0.17.0", FAILED),
        ("megatron-core", None, OK),
        ("transformers", "5.25.0", FAILED),
        ("ruff", "0.0.1", OK),  # a tool for developers
        ("triton", "3.9.0", OK),
        ("triton", "3.8.0", FAILED),  # torch's own metadata asks for another
    ],
)
def test_a_package_of_some_runs(tmp_path: Path, pretend: Pretend, name: str, version: str | None, state: str) -> None:
    pretend({name: version})
    finding = packages.check_optional_packages(alone(tmp_path))
    assert finding.state == state
    assert (name in finding.found) == (name != "ruff")


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cpu", OK), ("2.13.0a0+b34.nv26.07", OK), ("2.14.0", FAILED), ("2.12.1", FAILED), (None, FAILED)],
)
def test_the_version_of_torch(tmp_path: Path, pretend: Pretend, version: str | None, state: str) -> None:
    pretend({"torch": version})
    finding = check_torch(alone(tmp_path))
    assert finding.state == state
    assert state == OK or finding.cure == "pip install 'torch<2.14,>=2.13.0a0'"
