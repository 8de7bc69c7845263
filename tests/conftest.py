from __future__ import annotations

from collections.abc import Iterator

import pytest


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
