"""GPUs by name."""

from __future__ import annotations

import pytest

from sleeptrain.distributed.gpus import GPUS, find_gpu
from sleeptrain.errors import ConfigError


@pytest.mark.parametrize("name", ["H100", "h100"])
def test_a_gpu_is_found_in_upper_and_lower_case(name: str) -> None:
    assert find_gpu(name) == ("H100", GPUS["H100"])


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"^--gpu: unknown GPU 'h10'; did you mean 'H100'\? \(allowed: B300, .*4090\)"
    ):
        find_gpu("h10")


def test_data_sheets_are_in_bytes_and_flops_per_second() -> None:
    for gpu in GPUS.values():
        assert 1e14 < gpu.flops < 1e16 and 2e10 < gpu.memory < 1e12
        assert gpu.bandwidth > gpu.intra >= gpu.inter > 1e9
