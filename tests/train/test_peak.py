"""The peak that utilisation is relative to."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from sleeptrain.distributed.gpus import GPUS
from sleeptrain.train import peak
from sleeptrain.train.peak import peak_flops

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", GPUS)
def test_a_known_gpu_has_the_peak_of_its_data_sheet(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name} 80GB HBM3")
    assert peak_flops(CUDA) == GPUS[name].flops


def test_the_peak_of_another_gpu_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other 9000")
    assert peak_flops(CUDA) is None


def test_the_peak_of_a_cpu_is_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four products of 1024 x 1024 matrices take 2, 1, 4 and 3 seconds, after one that is not timed."""
    clock, products = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0, 30.0, 33.0]), list[tuple[int, ...]]()
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append((*a.shape, *b.shape)))
    monkeypatch.setattr(peak, "_measured_cpu_peak", cache(peak._measured_cpu_peak.__wrapped__))
    assert [peak_flops(torch.device("cpu")) for _ in range(2)] == [2 * 1024**3] * 2, "measured once"
    assert products == [(1024,) * 4] * 5
