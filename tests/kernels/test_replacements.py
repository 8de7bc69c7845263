"""Packages that flash-linear-attention takes in place of its own kernels where they are installed: FlashQLA never runs
here, TileLang only when it is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

from sleeptrain.ops import fla, fla_package
from tests.kernels import interpreter
from tests.kernels.backends import REPLACEMENTS
from tests.kernels.tuning import chosen
from tests.ops.cases import delta_inputs

TILELANG, FLASH_QLA = ((*REPLACEMENTS[name].place, REPLACEMENTS[name].function) for name in ("tilelang", "flash_qla"))

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1: make test-kernels"),
]


class TakenError(Exception):
    pass


def install(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: str) -> None:
    """Let a replacement be as if it were installed and took every call."""
    replacement = getattr(importlib.import_module(module), name)

    def take(*args: object, **kwargs: object) -> None:
        raise TakenError

    monkeypatch.setattr(replacement, "is_available", classmethod(lambda cls: True))
    monkeypatch.setattr(replacement, f"{function}_verifier", lambda *args, **kwargs: (True, None))
    monkeypatch.setattr(replacement, function, take)


@pytest.fixture(autouse=True)
def _no_switch_is_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for switch in ("FLA_FLASH_QLA", *fla_package.REPLACEMENTS):
        monkeypatch.setenv(switch, "")  # so that it is removed again
        monkeypatch.delenv(switch)
    with chosen(last=False):
        yield


def gradient() -> torch.Tensor:
    q, k, v, g, beta, S = delta_inputs(1, 1, 1, 1, 16, 16, dtype=torch.float32)
    o, _ = fla.gated_delta_rule(q, k, v, g, beta, initial_state=S, reset_BT=None, qk_l2norm=True)
    return torch.autograd.grad(o.sum(), q)[0]


@pytest.mark.parametrize("place", [FLASH_QLA, TILELANG])
def test_it_is_not_taken(monkeypatch: pytest.MonkeyPatch, place: tuple[str, str, str]) -> None:
    install(monkeypatch, *place)
    assert gradient().isfinite().all()


def test_tilelang_is_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *TILELANG)
    os.environ["FLA_TILELANG"] = "1"
    with pytest.raises(TakenError):
        gradient()


def test_flash_qla_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces the public function of the package, which nothing calls."""
    install(monkeypatch, *FLASH_QLA)
    os.environ["FLA_FLASH_QLA"] = "1"
    assert gradient().isfinite().all()
    q, k, v, g, beta, _ = (x.detach() for x in delta_inputs(1, 1, 1, 1, 16, 16, dtype=torch.float32))
    with pytest.raises(TakenError):
        fla_package.from_fla("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")(q, k, v, g, beta)


def test_the_tests_know_all_switches() -> None:
    assert {replacement.switch for replacement in REPLACEMENTS.values()} == {*fla_package.REPLACEMENTS, "FLA_FLASH_QLA"}
