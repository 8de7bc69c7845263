"""The loss from the logits of some rows at a time, against whole logits."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.model.hybrid import Hybrid, rows_at_once
from sleeptrain.model.linear import computing_in
from sleeptrain.model.working_copies import working_copies
from tests.models import VOCABULARY, tiny_config

ROOT = Path(__file__).resolve().parents[2]
ROWS = 37


def outcome(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, bf16: bool = False, **changes: object
) -> list[torch.Tensor]:
    """Loss and gradients with the logits of at most `rows` rows at once."""
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", rows * VOCABULARY)
    model = Hybrid(tiny_config(**changes))  # type: ignore[arg-type]
    model.init_weights(0)
    model.to(dtype)
    draw = torch.Generator().manual_seed(1)
    x_ND = torch.randn(ROWS, model.config.dim, generator=draw).to(dtype).requires_grad_()
    targets_N = torch.randint(VOCABULARY, (ROWS,), generator=draw)
    with contextlib.ExitStack() as stack:
        if bf16:
            stack.enter_context(computing_in(model, torch.bfloat16))
            stack.enter_context(working_copies(model))
        loss = model.cross_entropy(x_ND, targets_N)
        (loss / ROWS).backward()
    assert model.norm is not None
    gradients = [x_ND.grad, model.head_weight.grad, model.norm.weight.grad]
    return [loss.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"logits_divisor": 3.0}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_some_rows_at_a_time_equal_all(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, changes: dict[str, object]
) -> None:
    whole = outcome(monkeypatch, 64, dtype, **changes)
    for a, b in zip(outcome(monkeypatch, 8, dtype, **changes), whole, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_in_bf16_they_are_as_near_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = outcome(monkeypatch, 64, torch.float32)
    whole, parts = (outcome(monkeypatch, rows, torch.float32, bf16=True) for rows in (64, 8))
    for a, b, wanted in zip(parts, whole, exact, strict=True):
        assert a.dtype == torch.float32
        scale = float(wanted.norm())
        assert float((a - wanted).norm()) < 1.5 * float((b - wanted).norm()) + 2e-3 * scale


def test_a_reader_gets_all_logits_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Hybrid(tiny_config()), list[tuple[int, torch.Tensor, torch.Tensor]]()
    model.init_weights(0)
    x_ND, targets_N = torch.randn(5, 16), torch.arange(5)
    whole = model.cross_entropy(x_ND, targets_N)
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", 2 * VOCABULARY)
    with torch.no_grad():
        loss = model.cross_entropy(x_ND, targets_N, lambda *rows: seen.append(rows))
    assert [(first, len(logits)) for first, logits, _ in seen] == [(0, 2), (2, 2), (4, 1)]
    torch.testing.assert_close(torch.cat([logits for _, logits, _ in seen]), model.logits(x_ND))
    assert torch.equal(torch.cat([targets for *_, targets in seen]), targets_N)
    torch.testing.assert_close(loss, whole)


def test_a_reader_of_no_targets_gets_no_rows() -> None:
    model, seen = Hybrid(tiny_config()), list[int]()
    none = torch.zeros(0, dtype=torch.long)
    loss = model.cross_entropy(torch.zeros(0, 16), none, lambda _, logits, __: seen.append(len(logits)))
    assert float(loss) == 0 and sum(seen) == 0


@pytest.mark.parametrize(("vocab_size", "rows"), [(2**26, 1), (2**27, 1), (248_320, 256), (49_152, 1024), (3, 2**24)])
def test_rows_at_once(vocab_size: int, rows: int) -> None:
    assert rows_at_once(vocab_size) == rows


MEASURE = """
import resource, sys
import torch
from sleeptrain.model import hybrid
from tests.models import tiny_config
torch.set_num_threads(1)
config = tiny_config()
config.vocab_size, config.dim = 248_320, 64
if sys.argv[1] == "whole":
    hybrid.MOST_LOGITS = 2**40
model = hybrid.Hybrid(config)
model.init_weights(0)
torch.manual_seed(0)
x, targets = torch.randn(1024, 64, requires_grad=True), torch.randint(248_320, (1024,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = model.cross_entropy(x, targets)
loss.backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(peak, float(loss.detach()), float(x.grad.norm()), float(model.head_weight.grad.norm()))
"""


@pytest.mark.slow
def test_a_large_vocabulary_takes_a_third_of_the_memory() -> None:
    """With 248,320 ids and 1,024 rows in fp32: the peak beside the weights, and the same loss and gradients."""
    found = {}
    for name in ("whole", "parts"):
        command = [sys.executable, "-c", MEASURE, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT, check=True)
        found[name] = [float(word) for word in done.stdout.split()]
    assert found["parts"][0] * 3 < found["whole"][0]
    assert found["parts"][1:] == pytest.approx(found["whole"][1:], rel=1e-5)
