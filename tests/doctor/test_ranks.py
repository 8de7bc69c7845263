"""The checks of several processes, as forked ranks over gloo."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain.doctor.finding import FAILED, OK, SKIPPED, Finding
from tests.doctor.cases import found, limited, states

pytestmark = pytest.mark.usefixtures("imported", "on_cpu")
ALL = ("collective", "tensor", "zero")
ALL_OK = dict.fromkeys(ALL, OK)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def findings(tmp_path: Path, *settings: str) -> dict[str, Finding]:
    return found(ALL, tmp_path, *settings)


def test_all_is_well(tmp_path: Path) -> None:
    results = findings(tmp_path)
    assert states(results) == ALL_OK
    assert results["collective"].found == "gloo over 2 processes"


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_zero_stage_is_that_of_the_settings(tmp_path: Path, zero: int) -> None:
    results = findings(tmp_path, f"parallel.zero={zero}")
    assert states(results) == ALL_OK and f"ZeRO-{zero}" in results["zero"].found


def test_a_wrong_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dist.all_reduce

    def wrong(x: torch.Tensor, *args: Any, **options: Any) -> None:
        right(x, *args, **options)
        x[-1] += 1

    monkeypatch.setattr(dist, "all_reduce", wrong)
    results = findings(tmp_path)
    assert states(results) == {"collective": FAILED, "tensor": SKIPPED, "zero": SKIPPED}
    assert "GLOO_SOCKET_IFNAME" in results["collective"].cure


def test_a_sum_that_one_process_never_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dist.all_reduce

    def late(x: torch.Tensor, *args: Any, **options: Any) -> None:
        if dist.get_rank() == 1:
            time.sleep(600)
        right(x, *args, **options)

    monkeypatch.setattr(dist, "all_reduce", late)
    limited(monkeypatch, "collective", 3)
    results = findings(tmp_path)
    assert states(results) == {"collective": FAILED, "tensor": SKIPPED, "zero": SKIPPED}
    assert "no answer" in results["collective"].found


def test_a_missing_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    finding = findings(tmp_path)["collective"]
    assert finding.state == FAILED and "nosuch0" in finding.found and "GLOO_SOCKET_IFNAME" in finding.cure


def test_layers_that_are_not_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sleeptrain.parallel.tensor import regions

    monkeypatch.setattr(regions.RowLinear, "forward", lambda row, x: x @ row.weight.T)
    assert states(findings(tmp_path)) == ALL_OK | {"tensor": FAILED}


def test_a_gradient_that_is_not_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sleeptrain.parallel.tensor import collectives

    monkeypatch.setattr(collectives, "enter", lambda x, axis: x)
    results = findings(tmp_path)
    assert states(results) == ALL_OK | {"tensor": FAILED} and "gradient" in results["tensor"].found


def test_a_step_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sleeptrain.parallel.zero.engine import ZeroEngine

    right = ZeroEngine.step
    monkeypatch.setattr(ZeroEngine, "step", lambda engine, scale: right(engine, 0.9 * scale))
    results = findings(tmp_path)
    assert states(results) == ALL_OK | {"zero": FAILED} and "pip install" in results["zero"].cure


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "deepspeed" else right(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    results = findings(tmp_path)
    assert states(results) == ALL_OK | {"zero": SKIPPED} and "sleeptrain[parallel]" in results["zero"].found
    results = findings(tmp_path, "parallel.tensor=2")
    assert states(results) == ALL_OK | {"zero": FAILED} and "sleeptrain[parallel]" in results["zero"].cure
