"""The packages of an installation: the ranges of pyproject.toml, the locks, and their use by `make`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.locks import ROOT, declared, lock_lines, pins, project

EXTRAS = ("data", "gpu", "hf", "eval", "parallel", "dev")
# A newer release may break a run: this package overrides parts of it, or depends on its behaviour.
BOUNDED = [
    *(
        "torch",
        "numpy",
        "hydra-core",
        "omegaconf",
        "sentencepiece",
        "webdataset",
        "braceexpand",
        "fsspec",
        "safetensors",
    ),
    *("tokenizers", "wandb", "transformers", "protobuf", "lm-eval", "megatron-core", "deepspeed"),
    *("flash-linear-attention", "pyarrow", "zstandard"),
]
LOCKS = {"cpu": ("dev",), "gpu": ("dev", "gpu"), "lowest": ("dev",), "kernels": ("gpu",)}
CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")


def ranges(name: str, *extras: str) -> list[SpecifierSet]:
    found = [r.specifier for r in declared(*extras) if r.name == name]
    assert found
    return found


@pytest.mark.parametrize("name", BOUNDED)
def test_no_range_is_open_where_a_newer_release_may_break_a_run(name: str) -> None:
    [*found] = [r.specifier for r in declared(*EXTRAS) if r.name == name]
    assert any(not s.contains("9999", prereleases=True) for s in found) and not any(s == SpecifierSet() for s in found)


@pytest.mark.parametrize("extra", ["hf", "eval", "dev"])
def test_generation_is_tested_with_the_range_of_transformers(extra: str) -> None:
    """5.24 renamed arguments that generation passes to a model. The changes of 5.25 are unknown."""
    for range_ in ranges("transformers", extra):
        assert [v for v in ("5.6.2", "5.22.2", "5.23.0", "5.24.0", "5.24.1", "5.25.0", "6.0") if v in range_] == [
            "5.23.0",
            "5.24.0",
            "5.24.1",
        ]


def test_the_kernels_come_with_a_triton_whose_backward_runs_on_hopper() -> None:
    """flash-linear-attention 0.6 raises in the backward of Gated DeltaNet with Triton from 3.4 to below 3.7.1."""
    [triton] = ranges("triton", "gpu")
    assert [v for v in ("3.4.0", "3.6.0", "3.7.0", "3.7.1", "3.8.0") if v in triton] == ["3.7.1", "3.8.0"]
    both = SpecifierSet(",".join(str(s) for s in ranges("torch", "gpu")), prereleases=True)
    vendors = ("2.11.0a0+a6c236b9fd.nv26.03", "2.13.0a0+9186a08b2c.nv26.07", "2.14.0a0+4fdf77b940.nv26.08")
    tried = ("2.8.0", "2.12.1", "2.13.0", "2.13.0+cu130", *vendors)
    assert [v for v in tried if v in both] == ["2.13.0", "2.13.0+cu130", vendors[1]]


def test_the_documented_images_have_these_versions() -> None:
    """docs/containers.md lists torch and Triton of each base. The Dockerfile's base is one of them."""
    rows = re.findall(r"^\| `(\S+)` \| (\S+) \| (\S+) \|", (ROOT / "docs/containers.md").read_text(), re.MULTILINE)
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert set(re.findall(r"BASE_IMAGE=(\S+)", dockerfile)) == {image for image, _, _ in rows}
    for _, torch, triton in rows:
        assert all(s.contains(torch, prereleases=True) for s in ranges("torch", "gpu"))
        assert ranges("triton", "gpu")[0].contains(triton, prereleases=True)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_one_version_of_every_requirement(name: str) -> None:
    lines = lock_lines(ROOT / "requirements" / f"{name}.txt")
    assert len(lines) == len({Requirement(line).name for line in lines})
    locked = pins(name)
    for pin in locked.values():
        [only] = pin.specifier
        assert only.operator == "==" and "+" not in only.version  # a local version is found at one index only
    for requirement in (*declared(*LOCKS[name]), *map(Requirement, project()["build-system"]["requires"])):
        [pinned] = locked[requirement.name].specifier
        assert requirement.specifier.contains(pinned.version, prereleases=True), requirement


def test_a_machine_without_a_gpu_gets_no_cuda() -> None:
    for name in ("cpu", "lowest"):
        assert not [package for package in pins(name) if CUDA.fullmatch(package)]
    gpu = pins("gpu")
    assert {"triton", "flash-linear-attention", "nvidia-nccl-cu13"} <= set(gpu)
    shared = {package: pin for package, pin in gpu.items() if package in pins("cpu")}
    assert {p: str(pin) for p, pin in shared.items()} == {p: str(pin) for p, pin in pins("cpu").items()}


def test_the_kernels_are_tested_in_the_versions_that_gpus_get_without_cuda() -> None:
    kernels, gpu = pins("kernels"), pins("gpu")
    assert {package for package in kernels if CUDA.fullmatch(package)} == {"triton"}
    assert {p: pin.specifier for p, pin in kernels.items()} == {p: gpu[p].specifier for p in kernels}


def test_the_site_is_made_beside_the_package_of_the_cpu_lock() -> None:
    """`.venv-docs` reads the packages of `.venv` too: what both have must be one version."""
    docs, cpu = pins("docs"), pins("cpu")
    assert {"sphinx", "myst-parser", "furo"} <= set(docs)
    assert {p: pin.specifier for p, pin in docs.items() if p in cpu} == {p: cpu[p].specifier for p in docs if p in cpu}


def test_the_lowest_are_the_lowest() -> None:
    assert str(pins("lowest")["transformers"].specifier) == "==5.23.0"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `make install` reads, and a newer stamp of an installation without GPUs."""
    for name in ("Makefile", "pyproject.toml", "requirements"):
        source = ROOT / name
        copied = shutil.copytree if source.is_dir() else shutil.copy
        copied(source, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    stamp(tmp_path, gpu=0)
    for path in [*tmp_path.iterdir(), *(tmp_path / "requirements").iterdir()]:
        os.utime(path, (1, 1))
    return tmp_path


def stamp(checkout: Path, gpu: int) -> None:
    (checkout / ".venv/.ok").write_text(f"{gpu}\n")
    os.utime(checkout / ".venv/.ok", (100, 100))


def planned(checkout: Path, *arguments: str) -> str:
    """The commands that make would run."""
    command = ["make", "-n", "-C", str(checkout), *arguments, "install"]
    environment = {k: v for k, v in os.environ.items() if k not in ("GPU", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    return done.stdout


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/cpu.txt", "requirements/install.sh"])
def test_an_installation_is_made_again_when_its_inputs_change(checkout: Path, changed: str) -> None:
    assert "install.sh" not in planned(checkout)
    os.utime(checkout / changed, (200, 200))
    assert "requirements/install.sh .venv requirements/cpu.txt" in planned(checkout)


def test_an_installation_for_gpus_replaces_another_and_stays(checkout: Path) -> None:
    plan = planned(checkout, "GPU=1")
    assert plan.index("rm -rf .venv") < plan.index(
        "GPU=1 PYTHON=python3 requirements/install.sh .venv requirements/gpu.txt"
    )
    stamp(checkout, gpu=1)
    assert "install.sh" not in planned(checkout)  # on a login node, say
    os.utime(checkout / "requirements/gpu.txt", (200, 200))
    assert "rm -rf" not in planned(checkout) and "requirements/gpu.txt" in planned(checkout)


def test_the_listed_tests_of_other_libraries_exist() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    [tests] = re.findall(r"^INSIDES := (.*)$", makefile, re.MULTILINE)
    assert len(tests.split()) > 5
    for name in tests.split():
        assert (ROOT / name).exists(), name
