from __future__ import annotations

import pytest
import torch

from sleeptrain.ops.device import as_on_gpu, runs_kernels


class OnCuda:
    """Stands in for a tensor's device and dtype."""

    def __init__(self, dtype: torch.dtype):
        self.is_cuda, self.dtype = True, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_runs_kernels_and_a_cpu_does_not(dtype: torch.dtype) -> None:
    assert runs_kernels(OnCuda(dtype))  # type: ignore[arg-type]
    assert not runs_kernels(torch.zeros(1, dtype=dtype))


def test_fp64_never_runs_on_kernels() -> None:
    wide = torch.zeros(1, dtype=torch.float64)
    with as_on_gpu():
        assert not runs_kernels(wide)
    assert not runs_kernels(OnCuda(torch.float64))  # type: ignore[arg-type]


def test_a_cpu_may_stand_for_a_gpu_until_the_context_ends() -> None:
    x = torch.zeros(1)
    with pytest.raises(ZeroDivisionError), as_on_gpu():
        with as_on_gpu():
            assert runs_kernels(x)
        assert runs_kernels(x), "the inner context must not end the outer one"
        raise ZeroDivisionError
    assert not runs_kernels(x)
