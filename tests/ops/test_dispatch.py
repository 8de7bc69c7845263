from __future__ import annotations

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.ops import dispatch, gated_delta_rule, ssd
from tests.ops.cases import delta_inputs, ssd_inputs


class OnCuda:
    """Stands in for a tensor's device and dtype."""

    def __init__(self, dtype: torch.dtype):
        self.is_cuda, self.dtype, self.device = True, dtype, "cuda:0"


def test_device_and_dtype_decide() -> None:
    assert dispatch.choose("auto", "save", torch.zeros(1)) == "chunked"
    assert dispatch.choose("auto", "save", OnCuda(torch.bfloat16)) == "fla"  # type: ignore[arg-type]
    assert dispatch.choose("auto", "save", OnCuda(torch.float64)) == "chunked"  # type: ignore[arg-type]


@pytest.mark.parametrize("make", ["delta", "ssd"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"implementation": "fla"}, "runs on CUDA tensors"),
        ({"implementation": "triton"}, "none of auto"),
        ({"memory": "none"}, "none of save"),
    ],
)
def test_an_impossible_choice_is_refused(make: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        if make == "delta":
            gated_delta_rule(*delta_inputs(1, 3, 1, 1, 2, 2)[:5], **options)  # type: ignore[arg-type]
        else:
            ssd(*ssd_inputs(1, 3, 1, 1, 2, 2)[:5], **options)  # type: ignore[arg-type]


def test_shapes_that_do_not_match_are_refused() -> None:
    q, k, v, g, beta, S = delta_inputs(1, 3, 2, 4, 2, 2)
    with pytest.raises(ValueError, match="beta has shape"):
        gated_delta_rule(q, k, v, g, beta[:, :2])
    with pytest.raises(ValueError, match="initial_state has shape"):
        gated_delta_rule(q, k, v, g, beta, initial_state=S[:, :1])
    with pytest.raises(ValueError, match="share"):
        gated_delta_rule(q, k, v[:, :, :3], g, beta)
    C, B, x, dt, A, _ = ssd_inputs(1, 3, 2, 4, 2, 2)
    with pytest.raises(ValueError, match="dt has shape"):
        ssd(C, B, x, dt[..., :2], A)
