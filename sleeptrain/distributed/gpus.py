"""What known GPUs can do at best, from their vendors' data sheets: what MFU and forecasts are held against."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.suggest import suggest
from sleeptrain.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """flops: dense bf16, FLOP/s. memory: bytes. bandwidth: of the memory, bytes/s. intra, inter: bytes/s that one GPU
    sends to others of its machine (NVLink, or PCIe where there is none) and of other machines (its share of the
    network: one 400 Gb/s adapter a GPU where machines are sold so, else one of 200 Gb/s)."""

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
    """The GPU of this name, in any case. Raises ConfigError, which lists those known, for another one."""
    if found := GPUS.get(name.upper()):
        return name.upper(), found
    raise ConfigError(f"--gpu: unknown GPU '{name}'; {suggest(name.upper(), list(GPUS))}")
