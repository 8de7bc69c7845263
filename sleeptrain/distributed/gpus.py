"""Peak values of known GPUs, from the vendors' data sheets. MFU and forecasts refer to them."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """The peak values of one GPU.

    flops: dense bf16, FLOP/s.
    memory: bytes.
    bandwidth: of the memory, bytes/s.
    intra: bytes/s that it sends to GPUs of the same machine (over NVLink, or PCIe without NVLink).
    inter: bytes/s that it sends to other machines. A GPU has one network adapter, of 400 Gb/s if machines are sold so,
        else of 200 Gb/s.
    """

    flops: float
    memory: float
    bandwidth: float
    intra: float
    inter: float


GPUS = {
    "B300": Gpu(2250e12, 288e9, 8.0e12, 900e9, 100e9),
    "B200": Gpu(2250e12, 180e9, 7.7e12, 900e9, 50e9),
    "H200": Gpu(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "H100": Gpu(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "A100": Gpu(312e12, 80e9, 2.039e12, 300e9, 25e9),
    "L40": Gpu(181e12, 48e9, 0.864e12, 32e9, 25e9),
    "4090": Gpu(165e12, 24e9, 1.008e12, 32e9, 25e9),
}


def find_gpu(name: str) -> tuple[str, Gpu]:
    """The GPU of this name, in upper or lower case. Raises ConfigError, which lists known GPUs, for another name."""
    if gpu := GPUS.get(name.upper()):
        return name.upper(), gpu
    raise ConfigError(f"--gpu: unknown GPU '{name}'; {suggest(name.upper(), list(GPUS))}")
