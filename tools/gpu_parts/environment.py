"""Which GPU, which driver, which versions: what the other figures are figures of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from typing import Any

import torch

from gpu_parts import Note, Options
from gpu_parts.page import table
from sleeptrain.errors import ConfigError
from sleeptrain.ops.fla_package import REPLACEMENTS, load_kernels

PACKAGES = ("torch", "triton", "flash-linear-attention", "fla-core", "transformers", "megatron-core", "deepspeed")
OF_KERNELS = ("tilelang", "flash_qla")  # what flash-linear-attention may take in place of its own


def run(options: Options, note: Note) -> list[str]:
    note({"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.platform()})
    note({"versions": {name: _version(name) for name in PACKAGES}})
    note({"replacements": {name: importlib.util.find_spec(name) is not None for name in OF_KERNELS}})
    note({"switches": {name: os.environ.get(name) for name in (*REPLACEMENTS, "FLA_FLASH_QLA")}})
    note({"attention": _attention()})
    if options.device == "cpu":
        return []
    note({"gpu": _gpu(), "driver": _driver()})
    try:
        load_kernels()
    except ConfigError as error:
        return [str(error)]
    return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attention() -> dict[str, bool]:
    """The back ends of attention that this torch may choose."""
    backends = torch.backends.cuda
    return {
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
        "varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str:
    """The driver's version, and the clocks and the power that the card may have."""
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit,ecc.mode.current"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=15,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not say: {error}"
    return done.stdout.strip()


def lines(result: dict[str, Any]) -> list[str]:
    gpu = result.get("gpu", {})
    rows = [[name, str(value)] for name, value in gpu.items()]
    rows += [["driver, clocks (SM, memory), power, ECC", result["driver"]]] if "driver" in result else []
    rows += [["python", result["python"]], ["system", f"{result['system']}, {result['cores']} cores"]]
    rows += [[name, version or "not installed"] for name, version in result["versions"].items()]
    rows += [
        [f"{name} (replaces kernels)", "installed" if has else "no"] for name, has in result["replacements"].items()
    ]
    rows += [["back ends of attention", ", ".join(name for name, on in result["attention"].items() if on)]]
    return table(["", ""], rows)
