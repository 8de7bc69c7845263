from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def imported() -> Iterator[None]:
    """Workers are forks: what they import is imported once, here. The ranks are on the CPU, also beside CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("megatron.core")
        pytest.importorskip("deepspeed")
        yield
