from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


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
        yield
