from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from sleeptrain.ops.device import as_on_gpu
from tests.kernels import interpreter
from tests.kernels.backends import REPLACEMENTS, Backend, only
from tests.kernels.tuning import chosen

if interpreter.ACTIVE:
    interpreter.install()


@pytest.fixture
def calls() -> list[str]:
    """The calls of the replacement that is tested, if one is."""
    return []


@pytest.fixture
def backend(request: pytest.FixtureRequest, calls: list[str]) -> Iterator[Backend]:
    """The parameter of the test; its kernels and no others run until the test ends, in all that models call."""
    tested: Backend = request.param
    if lack := tested.why_not():
        pytest.skip(lack)
    # Kernels with several configurations run with the first one in fp32 and with the last one in fp16 and bf16.
    tuned = request.config.getoption("--tuned") and not interpreter.ACTIVE
    configurations = nullcontext() if tuned else chosen(last=tested.dtype.itemsize == 2)
    # Decays above the diagonal overflow; they are masked.
    with only(tested.name, calls), configurations, as_on_gpu(), np.errstate(over="ignore"):
        yield tested


@pytest.fixture
def within(backend: Backend, calls: list[str], record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Hold an error to the backend's tolerance, times a factor, and note it for the summary."""

    def hold(kernel: str, found: float, factor: float = 1.0) -> None:
        assert calls or backend.name not in REPLACEMENTS, f"fla did not take {backend.name}"
        record_property("error", [kernel, backend.label, found])
        assert found <= factor * backend.tolerance, f"{kernel}: error {found:.1e}"

    return hold


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The largest error of each kernel, as docs/numerics.md lists them."""
    largest: dict[tuple[str, str], float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == "error" and getattr(report, "when", "") == "call":
                    kernel, label, found = value
                    largest[kernel, label] = max(largest.get((kernel, label), 0.0), found)
    if largest:
        terminalreporter.section("largest errors")
    for (kernel, label), found in sorted(largest.items()):
        terminalreporter.write_line(f"{kernel:<42} {label:<20} {found:.1e}")
