"""The time of kernels on a GPU, by the roofline: the longer of what products and memory need, at shares of the peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sleeptrain.distributed.gpus import GPUS, Gpu
from sleeptrain.plan.roofline.fusion import Kernel
from sleeptrain.plan.roofline.kinds import Kind


@dataclass(frozen=True)
class Shares:
    """What a GPU reaches of its data sheet, and times of the host. None is a measurement of this code.

    wide_product: of the peak, in products whose result has 512 rows and columns or more: cuBLAS in bf16 on Hopper
        reaches 0.6 to 0.75 of it.
    narrow_product: in others, which leave part of the GPU without a tile.
    fp32_product: of the bf16 peak, in products of fp32 matrices, which use no tensor cores: an H200's sheet gives 67
        TFLOP/s against 989, of which three quarters are reached.
    bandwidth: of the memory's, in kernels that stream.
    least: seconds of the shortest kernel, with the gap to the next.
    call: seconds of the host for an operator that PyTorch calls, forward or backward.
    launch: seconds of the host for a kernel that a compiled graph launches.
    replay: seconds of the host for the layers of a round, forward or backward, as a CUDA graph: one launch, and the
        Python that finds the graph and copies its inputs, which takes 0.5 ms a round on a CPU without the launches.
    """

    wide_product: float = 0.65
    narrow_product: float = 0.3
    fp32_product: float = 0.05
    bandwidth: float = 0.8
    least: float = 2.5e-6
    call: float = 7.5e-6
    launch: float = 5e-6
    replay: float = 2.7e-4


SHARES = Shares()


def seconds(kernel: Kernel, gpu: Gpu, shares: Shares = SHARES) -> float:
    """The time of a kernel. Published times of an H200 grow by the ratio of peaks or bandwidths, the larger one."""
    share = shares.wide_product
    if kernel.wide:
        share = shares.fp32_product
    elif kernel.narrow:
        share = shares.narrow_product
    h200 = GPUS["H200"]
    published = kernel.h200 * max(h200.flops / gpu.flops, h200.bandwidth / gpu.bandwidth)
    product = kernel.flops / (gpu.flops * share) if kernel.kind in (Kind.PRODUCT, Kind.HEAD) else 0.0
    return max(product, published, kernel.bytes / (gpu.bandwidth * shares.bandwidth), kernel.kernels * shares.least)


@dataclass(frozen=True)
class Count:
    """Work of some kernels, by kind.

    host: seconds of the host. waits: operators for which the host waits.
    """

    kernels: dict[Kind, float]
    bytes: dict[Kind, float]
    seconds: dict[Kind, float]
    host: float = 0.0
    waits: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the GPU."""
        return sum(self.seconds.values())

    @property
    def launched(self) -> float:
        return sum(self.kernels.values())

    def __add__(self, other: Count) -> Count:
        def both(a: dict[Kind, float], b: dict[Kind, float]) -> dict[Kind, float]:
            return {kind: a.get(kind, 0) + b.get(kind, 0) for kind in a | b}

        return Count(
            both(self.kernels, other.kernels),
            both(self.bytes, other.bytes),
            both(self.seconds, other.seconds),
            self.host + other.host,
            self.waits + other.waits,
        )

    def __mul__(self, times: float) -> Count:
        def each(a: dict[Kind, float]) -> dict[Kind, float]:
            return {kind: value * times for kind, value in a.items()}

        return Count(each(self.kernels), each(self.bytes), each(self.seconds), self.host * times, self.waits * times)

    def without(self, kind: Kind, share: float) -> Count:
        """Without this share of the work of one kind."""
        rest = self * 1
        for values in (rest.kernels, rest.bytes, rest.seconds):
            values[kind] = values.get(kind, 0.0) * (1 - share)
        return rest


NOTHING = Count({}, {}, {})


def count(kernels: Iterable[Kernel], gpu: Gpu, host: float, waits: int = 0) -> Count:
    """The work of these kernels on a GPU. host: seconds of the host."""
    numbers: dict[Kind, float] = {}
    sizes: dict[Kind, float] = {}
    times: dict[Kind, float] = {}
    for kernel in kernels:
        kind = kernel.kind
        numbers[kind] = numbers.get(kind, 0) + kernel.kernels
        sizes[kind] = sizes.get(kind, 0) + kernel.bytes
        times[kind] = times.get(kind, 0.0) + seconds(kernel, gpu)
    return Count(numbers, sizes, times, host, waits)
