"""The roofline."""

from __future__ import annotations

import pytest

from sleeptrain.distributed.gpus import GPUS, Gpu
from sleeptrain.plan.roofline.fusion import Kernel
from sleeptrain.plan.roofline.kernel_times import NOTHING, SHARES, count, seconds
from sleeptrain.plan.roofline.kinds import Kind

GPU = Gpu(flops=1e15, memory=1, bandwidth=1e12, intra=1, inter=1)


def test_the_slower_of_products_and_memory_counts() -> None:
    wide = Kernel(Kind.PRODUCT, 1, bytes=8, flops=10**13)
    assert seconds(wide, GPU) == pytest.approx(1e13 / 0.65e15)
    assert seconds(Kernel(Kind.PRODUCT, 1, 8, 10**13, narrow=True), GPU) == pytest.approx(1e13 / 0.3e15)
    assert seconds(Kernel(Kind.HEAD, 1, 8, 10**13, wide=True, narrow=True), GPU) == pytest.approx(1e13 / 0.05e15)
    assert seconds(Kernel(Kind.ELEMENTWISE, 1, bytes=8 * 10**9), GPU) == pytest.approx(0.01)
    assert seconds(Kernel(Kind.ELEMENTWISE, 3, bytes=8), GPU) == pytest.approx(3 * SHARES.least)


def test_published_times_grow_on_slower_gpus() -> None:
    kernel = Kernel(Kind.RECURRENCE, 9, 8, h200=1.0)
    assert seconds(kernel, GPUS["H200"]) == 1.0
    assert seconds(kernel, GPUS["H100"]) == pytest.approx(4.8 / 3.35)
    assert seconds(kernel, GPUS["A100"]) == pytest.approx(989 / 312)


def test_counts_add_up() -> None:
    one = count([Kernel(Kind.CAST, 1, 8 * 10**9), Kernel(Kind.SUM, 2, 16 * 10**9)], GPU, host=1.0, waits=1)
    two = one + one * 2 + NOTHING
    assert (two.launched, two.host, two.waits) == (9, 3.0, 3)
    assert two.total == pytest.approx(0.09) and two.bytes[Kind.SUM] == 48 * 10**9
    assert one.without(Kind.SUM, 0.5).total == pytest.approx(0.02) and one.total == pytest.approx(0.03)
