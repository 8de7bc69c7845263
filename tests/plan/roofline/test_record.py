"""Records of operators."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.record import Call, Recorder


def sizes(call: Call) -> tuple[list[int], list[int]]:
    return [u.bytes for u in call.reads], [u.bytes for u in call.writes]


def test_a_product_has_its_flops_and_bytes() -> None:
    with FakeTensorMode(), Recorder() as recorder:
        a, b = torch.empty(600, 700, dtype=torch.bfloat16), torch.empty(700, 800, dtype=torch.bfloat16)
        a @ b
        torch.mm(a, b, out_dtype=torch.float32)
        torch.empty(600, 700) @ torch.empty(700, 16)
    plain, widening, fp32 = recorder.calls
    assert (plain.kind, plain.flops) == (Kind.PRODUCT, 2 * 600 * 700 * 800)
    assert sizes(plain) == ([2 * 600 * 700, 2 * 700 * 800], [2 * 600 * 800])
    assert widening.flops == plain.flops and sizes(widening)[1] == [4 * 600 * 800]
    assert (plain.wide, plain.narrow) == (widening.wide, widening.narrow) == (False, False)
    assert fp32.wide and fp32.narrow


def test_views_launch_nothing_and_expanded_elements_are_read_once() -> None:
    with Recorder() as recorder:
        x = torch.ones(4, 8)
        y = x.view(8, 4).t()[:2].unsqueeze(0)
        recorder.calls.clear()
        y + torch.empty(1).expand(8)
    [call] = recorder.calls
    assert sizes(call) == ([64, 4], [64]) and recorder.dispatched[0] > 5


def test_work_in_place_reads_what_it_changes_and_a_copy_does_not() -> None:
    with Recorder() as recorder:
        x, y = torch.empty(8), torch.empty(8, dtype=torch.bfloat16)
        x.add_(1)
        x.copy_(y)
        x.copy_(x.clone())
    add, cast, clone, copy = recorder.calls
    assert sizes(add) == ([32], [32]) and sizes(cast) == ([16], [32])
    assert [c.kind for c in (cast, clone, copy)] == [Kind.CAST, Kind.ELEMENTWISE, Kind.ELEMENTWISE]
    assert cast.reads[0].storage != cast.writes[0].storage == clone.reads[0].storage


def test_of_a_table_the_rows_are_read() -> None:
    with Recorder() as recorder:
        table, index = torch.empty(1000, 4), torch.zeros(3, dtype=torch.long)
        table[index]
        table.index_add_(0, index, torch.empty(3, 4))
    assert sizes(recorder.calls[1]) == ([48, 24], [48])
    assert sizes(recorder.calls[2]) == ([48, 24, 48], [48])


def test_sums_of_gradients_are_told_apart() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    recorder = Recorder()
    with recorder:
        y = (weight * 2).sum()
    recorder.begin_backward([weight.grad])
    with recorder:
        y.backward()
    assert [c.kind for c in recorder.calls if c.backward].count(Kind.SUM) == 1


def test_reductions() -> None:
    with Recorder() as recorder:
        x = torch.empty(4, 8)
        x.sum(-1)
        x.sum(0)
        x.sum()
        x.square()
    assert [c.reduces for c in recorder.calls] == ["rows", "all", "all", ""]
    assert [c.elements for c in recorder.calls] == [32] * 4


def test_a_product_that_adds_to_its_output_reads_it() -> None:
    with FakeTensorMode(), Recorder() as recorder:
        total, a, b = torch.empty(600, 800), torch.empty(600, 700).bfloat16(), torch.empty(700, 800).bfloat16()
        recorder.calls.clear()
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        torch.mm(total.t(), total, out=torch.empty(800, 800))
    narrow, wide = recorder.calls
    assert sizes(narrow) == ([4 * 600 * 800, 2 * 600 * 700, 2 * 700 * 800], [4 * 600 * 800])
    assert (narrow.flops, narrow.wide) == (2 * 600 * 700 * 800, False)
    assert sizes(wide) == ([4 * 600 * 800] * 2, [4 * 800 * 800]) and wide.wide
