"""The garbage collector is paused inside, and afterwards as it was before."""

from __future__ import annotations

import gc

import pytest

from sleeptrain.plan.collector import paused_collector


def test_the_collector_goes_on_afterwards_even_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), paused_collector():
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_paused_collector_stays_paused() -> None:
    gc.disable()
    try:
        with paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
