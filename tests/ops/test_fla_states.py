"""The launches of the kernels of states: shapes that are known without a look at the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.ops import fla_states
from sleeptrain.ops.segments import cut_at_resets
from tests.ops.cases import resets

B, T, H, K, V = 2, 150, 3, 96, 40


class Kernel:
    """In place of a kernel: keeps the arguments and the grid of its launch."""

    def __getitem__(self, grid: Any) -> Any:
        self.grid = grid
        return self.launch

    def launch(self, **arguments: Any) -> None:
        self.arguments = arguments

    def programs(self) -> int:
        return self.grid({"BK": 64, "BV": 32})[0]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    parts = {"prepare_chunk_offsets": lambda bounds, size: bounds // size}
    monkeypatch.setattr(fla_states, "from_fla", lambda module, name: parts.get(name, made))
    return made


@pytest.mark.parametrize("documents", [False, True])
def test_nothing_is_read_back_from_the_device(kernel: Kernel, documents: bool) -> None:
    """A fake tensor refuses to tell its values."""
    cut = cut_at_resets(resets(B, T))
    rows, tokens = (1, B * T) if documents else (B, T)
    count, chunks = (len(cut.row), len(cut.chunk_indices)) if documents else (B, 3)
    with FakeTensorMode() as mode:
        bounds = [mode.from_tensor(t) if documents else None for t in (cut.cu_seqlens, cut.chunk_indices)]
        k, v, g = torch.empty(rows, tokens, H, K), torch.empty(rows, tokens, H, V), torch.empty(rows, tokens, H)
        S = torch.empty(count, H, K, V)
        h, last = fla_states.forward_states(k, v, g, S, *bounds, dtype=torch.bfloat16, final=True)
        assert last is not None and (last.shape, last.dtype) == (S.shape, torch.float32)
        assert (h.shape, h.dtype) == ((rows, chunks, H, K, V), torch.bfloat16)
        assert kernel.programs() == 2 * 2 * count * H
        dh, first = fla_states.backward_states(k, v, g, S, None, 1.0, *bounds)
        assert first is not None and (first.shape, first.dtype) == (S.shape, torch.float32)
        assert (dh.shape, dh.dtype) == ((rows, chunks, H, K, V), torch.float32)
        assert kernel.programs() == 2 * 2 * count * H


def test_a_state_that_nobody_has_or_wants_is_not_made(kernel: Kernel) -> None:
    k, v, g = torch.empty(B, T, H, K), torch.empty(B, T, H, V), torch.empty(B, T, H)
    assert fla_states.forward_states(k, v, g, None, None, None, dtype=k.dtype, final=False)[1] is None
    assert kernel.arguments["h0"] is kernel.arguments["ht"] is kernel.arguments["split_offsets"] is None
    assert fla_states.backward_states(k, v, g, None, None, 1.0, None, None)[1] is None
    assert kernel.arguments["dh0"] is None
