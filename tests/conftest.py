from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

TESTS = Path(__file__).parent
# A fork does not collect what its parent has made, and so copies a third of the memory that it would touch.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
# What an engine of several processes imports when it is made, and each of the forks would import again.
LATER = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_repack",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "sleeptrain.distributed.cpu_shim",
    "sleeptrain.parallel.engine",
    "sleeptrain.parallel.tensor.layers",
)
# Folders with the longest files. They come first, so that no process has one left when the others have ended.
LONG = ("parallel", "checkpoint", "plan", "torture", "train", "doctor", "health", "hf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture
def by_bounds(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Attention reads documents by their bounds on a CPU too, in any dtype. The value lists the bounds of each call."""
    from sleeptrain.model.mixers import attention
    from tests.ops import varlen_on_cpu

    monkeypatch.setattr(attention, "runs_kernel", lambda like, dtype, head_dim: True)
    calls: list[torch.Tensor] = []
    monkeypatch.setattr(varlen_on_cpu, "CALLS", calls)
    return calls


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tuned",
        action="store_true",
        help="on a GPU, let kernels measure their configurations, as a run does; the first call of each size is slow",
    )


@pytest.fixture(scope="module")
def imported() -> Iterator[None]:
    """Imports once the packages of the workers, which are forks. The ranks are on the CPU, also with CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("megatron.core")
        pytest.importorskip("deepspeed")
        for name in LATER:
            with contextlib.suppress(ImportError):  # of another version
                importlib.import_module(name)
        yield
