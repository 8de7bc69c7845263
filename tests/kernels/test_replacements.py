"""flash-linear-attention takes FlashQLA in place of its own kernels where it is installed; here only when asked to."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from sleeptrain.ops import fla
from tests.kernels import interpreter
from tests.kernels.backends import REPLACEMENTS
from tests.ops.cases import delta_inputs

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not interpreter.ACTIVE, reason="needs TRITON_INTERPRET=1: make test-kernels"),
]


class TakenError(Exception):
    pass


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashQLA as if it were installed and took every call, with no variable set."""
    module, name = REPLACEMENTS["flash_qla"].place
    replacement = getattr(importlib.import_module(module), name)

    def take(*args: object, **kwargs: object) -> None:
        raise TakenError

    monkeypatch.setattr(replacement, "is_available", classmethod(lambda cls: True))
    monkeypatch.setattr(replacement, "chunk_gated_delta_rule_verifier", lambda *args, **kwargs: (True, None))
    monkeypatch.setattr(replacement, "chunk_gated_delta_rule", take)
    for switch in fla.REPLACEMENTS:
        monkeypatch.setenv(switch, "")  # so that it is removed again
        monkeypatch.delenv(switch)


def step() -> torch.Tensor:
    q, k, v, g, beta, S = (x.detach() for x in delta_inputs(1, 1, 1, 1, 16, 16, dtype=torch.float32))
    return fla.gated_delta_rule(q, k, v, g, beta, initial_state=S, reset_BT=None, qk_l2norm=True)[0]


def test_it_is_not_taken() -> None:
    assert step().isfinite().all()


def test_it_is_taken_when_asked_for() -> None:
    os.environ["FLA_FLASH_QLA"] = "1"
    with pytest.raises(TakenError):
        step()


def test_the_tests_know_all_switches() -> None:
    assert {replacement.switch for replacement in REPLACEMENTS.values()} == set(fla.REPLACEMENTS)
