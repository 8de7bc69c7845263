from __future__ import annotations

import pytest
import torch

from sleeptrain.model import hybrid
from sleeptrain.model.linear import computing_in
from tests.gpu.small import MODEL, model_on, relative

ROWS = 37


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_loss_of_some_rows_at_a_time_equals_fp64(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    place: torch.device,
    dtype: torch.dtype | None,
    tolerance: float,
) -> None:
    if dtype is not None and "interpreted" in request.node.name:
        pytest.skip("a CPU has no product of bf16 matrices that is added up in fp32")
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, MODEL.dim, generator=draw, dtype=torch.float64)
    targets = torch.randint(MODEL.vocab_size, (ROWS,), generator=draw)
    exact, model = model_on(torch.device("cpu"), torch.float64), model_on(place)
    results = []
    for each, rows, compute in ((exact, 2 * ROWS, None), (model, 8, dtype)):
        monkeypatch.setattr(hybrid, "MOST_LOGITS", rows * MODEL.vocab_size)
        x = features.detach().to(each.device, each.head_weight.dtype).clone().requires_grad_()
        with computing_in(each, compute):
            loss = each.cross_entropy(x, targets.to(each.device))
            loss.backward()
        results.append([loss, x.grad, each.head_weight.grad])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found is not None and expected is not None and found.dtype == torch.float32
        assert relative(found, expected) < tolerance
