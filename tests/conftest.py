from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def imported() -> Iterator[None]:
    """Imports once the packages of the workers, which are forks. The ranks are on the CPU, also with CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("megatron.core")
        pytest.importorskip("deepspeed")
        yield
