from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import Boundary, FastWeights, Recurrent
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.recompute import Recompute
from sleeptrain.sleep.rounds import plan_rounds, window_facts
from tests.models import random_batch, tiny_model
from tests.sleep.oracle import causal_layout, oracle_loss

EXACT = dict(rtol=1e-10, atol=1e-12)


def step(
    model: Hybrid,
    batch: Batch,
    window: int,
    passes: int,
    when: str = "every",
    feedback: str = "features",
    recompute: str = "none",
    core: tuple[int, int] | None = None,
    boundary: Boundary | None = None,
    state: FastWeights | None = None,
    bptt_passes: int | None = None,
):
    settings = LoopSettings(core or (0, model.num_layers), boundary or Boundary(), Recompute(recompute))
    rounds = plan_rounds(window_facts(batch, window), passes, when, feedback, bptt_passes=bptt_passes)
    return run_rounds(model, batch, rounds, state or model.empty_state(), settings)


def total(losses: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def gradients(model: Hybrid, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(model.named_parameters(), grads, strict=True)
    }


def assert_same(model: Hybrid, loss_a: torch.Tensor, loss_b: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(loss_a, loss_b, **(tolerance or EXACT))
    a, b = gradients(model, loss_a), gradients(model, loss_b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or EXACT), msg=lambda m, name=name: f"{name}: {m}")


ROWS = {
    "one document": [[0] * 11, [0] * 11],
    "documents inside windows": [[0] * 3 + [1] * 5 + [2] * 3, [0] * 6 + [1] * 5],
    "rows that differ": [[0] * 11, [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4]],
    "pads left and right": [[PAD] * 5 + [0] * 6, [0] * 2 + [1] * 4 + [PAD] * 5],
    "a row of pads": [[PAD] * 11, [0] * 11],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("when", ["every", "unlabelled"])
@pytest.mark.parametrize("feedback", ["features", "none"])
def test_equals_the_method_written_row_by_row(rows, when, feedback):
    model = tiny_model()
    batch = random_batch(rows, target_share=0.15 if when == "unlabelled" else 1.0, continues=[True, False])
    losses, state = step(model, batch, window=4, passes=3, when=when, feedback=feedback)
    expected, states_after = oracle_loss(model, batch, 4, 3, when, feedback)
    assert_same(model, total(losses), expected)
    if (batch.documents_BT[0, -4:] != PAD).all():  # row 0 goes on after the step: its state is complete
        for ours, theirs in zip(state.layers, states_after[0].layers, strict=True):
            if isinstance(ours, Recurrent):
                torch.testing.assert_close(ours.S_BHKV[:1], theirs.S_BHKV, **EXACT)


@pytest.mark.parametrize("bptt_passes", [1, 2])
@pytest.mark.parametrize("feedback", ["features", "none"])
@pytest.mark.parametrize("recompute", ["none", "pass"])
def test_gradients_flow_through_the_last_passes_alone(bptt_passes, feedback, recompute):
    model, batch = tiny_model(), random_batch(ROWS["rows that differ"], target_share=0.5)
    arguments = dict(window=4, passes=3, feedback=feedback)
    cut, _ = step(model, batch, recompute=recompute, bptt_passes=bptt_passes, **arguments)
    assert_same(model, total(cut), oracle_loss(model, batch, **arguments, bptt_passes=bptt_passes)[0])
    full, name = step(model, batch, **arguments)[0], "blocks.1.mixer.in_proj_qkv.weight"
    assert not torch.allclose(gradients(model, total(cut))[name], gradients(model, total(full))[name])


@pytest.mark.parametrize("boundary", [Boundary(), Boundary(carry_conv=True), Boundary(sliding_window=4)])
@pytest.mark.parametrize("feedback", ["features", "none"])
@pytest.mark.parametrize("core", [None, (1, 3)])
def test_a_sleep_pass_over_the_open_document_equals_one_over_the_window(boundary, feedback, core):
    """Losses, all gradients and the memory after the step, for tokens that are skipped and for the same as pads."""
    model = tiny_model(["attention", "gated_deltanet", "mamba2", "jet", "sliding_attention"])
    batch = random_batch([[0] * 3 + [1] * 2 + [2] * 8, [PAD] + [0] * 2 + [1] * 10], continues=[True, True])
    settings = LoopSettings(core or (0, model.num_layers), boundary)
    rounds = plan_rounds(window_facts(batch, 6), 3, feedback=feedback)
    assert {r.skip for r in rounds} == {0, 3}
    outcomes = []
    for plan in (rounds, [r.whole() for r in rounds]):
        losses, state = run_rounds(model, batch, plan, model.empty_state(), settings)
        outcomes.append((total(losses) + sum((t.double() ** 2).sum() for t in floating(state)), state))
    (skipped, state), (padded, expected) = outcomes
    assert_same(model, skipped, padded, rtol=1e-8, atol=1e-10)
    assert state.to_state_dict().keys() == expected.to_state_dict().keys()
    for ours, theirs in zip(tree_leaves(state), tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def floating(state: FastWeights) -> list[torch.Tensor]:
    return [t for t in tree_leaves(state) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def test_state_carried_into_the_next_step_equals_one_long_step():
    model = tiny_model()
    long = random_batch([[0] * 16, [0] * 5 + [1] * 11])
    losses, _ = step(model, long, window=4, passes=2)
    cut = [getattr(long, name)[:, :8] for name in ("tokens_BT", "targets_BT", "documents_BT")]
    rest = [getattr(long, name)[:, 8:] for name in ("tokens_BT", "targets_BT", "documents_BT")]
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    first, state = step(model, Batch(*cut, no, yes), window=4, passes=2)
    second, _ = step(model, Batch(*rest, yes, no), window=4, passes=2, state=state)
    assert_same(model, total(losses), total(first) + total(second))


def test_one_pass_is_the_plain_hybrid_with_windowed_attention():
    """Law 1, first half: blocks over the full row; attention and convolutions start anew at window borders."""
    model = tiny_model(["attention", "gated_deltanet"])
    batch = random_batch([[0] * 12])
    losses, _ = step(model, batch, window=4, passes=1)
    state, loss = model.empty_state(), 0.0
    for start in range(0, 12, 4):
        x, state = model.run(model.embed(batch.tokens_BT[:, start : start + 4]), state, causal_layout(4))
        targets = batch.targets_BT[0, start : start + 4]
        loss = loss + torch.nn.functional.cross_entropy(
            model.logits(x)[0], targets, ignore_index=IGNORE, reduction="sum"
        )
    assert_same(model, total(losses), loss)


@pytest.mark.parametrize("layers", [["gated_deltanet"] * 2, ["jet"] * 2, ["mamba2"] * 2, ["gated_deltanet", "mamba2"]])
def test_without_attention_one_pass_over_windows_is_one_pass_over_all(layers):
    """Law 1, second half, with the convolutions carried."""
    model = tiny_model(layers)
    batch = random_batch([[0] * 13, [0] * 5 + [1] * 8])
    carry = Boundary(carry_conv=True)
    windows, _ = step(model, batch, window=4, passes=1, boundary=carry)
    long, _ = step(model, batch, window=13, passes=1, boundary=carry)
    assert_same(model, total(windows), total(long))
    restarted, _ = step(model, batch, window=4, passes=1)
    assert not torch.allclose(total(windows), total(restarted)), "restarting the convolutions must differ"


def test_sliding_eviction_at_one_pass_is_sliding_window_attention():
    model = tiny_model(["attention", "attention"])
    batch = random_batch([[0] * 14, [0] * 6 + [1] * 8])
    windows, _ = step(model, batch, window=4, passes=1, boundary=Boundary(sliding_window=4))
    layout = causal_layout(14)
    at = torch.arange(14)
    near = (at[:, None] >= at) & (at[:, None] - at < 4)
    same = batch.documents_BT[:, :, None] == batch.documents_BT[:, None, :]
    layout = type(layout)(batch.documents_BT, None, None, (near & same).unsqueeze(1))
    x, _ = model.run(model.embed(batch.tokens_BT), model.empty_state(), layout)
    loss = torch.nn.functional.cross_entropy(
        model.logits(x).flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert_same(model, total(windows), loss)


def test_sliding_eviction_keeps_the_last_pass_of_the_window_before():
    model = tiny_model(["attention", "gated_deltanet"])
    batch = random_batch([[0] * 8])
    losses, _ = step(model, batch, window=4, passes=2, boundary=Boundary(sliding_window=4))
    sliding = Boundary(sliding_window=4)
    state = start = model.empty_state()
    x, state = model.run(model.embed(batch.tokens_BT[:, :4]), start, causal_layout(4), boundary=sliding)
    first = torch.nn.functional.cross_entropy(model.logits(x)[0], batch.targets_BT[0, :4], reduction="sum")
    # The sleep pass attends inside its window only, as the wake pass did: nothing was retained before it.
    x, state = model.run(x, state.replace(0, [None]), causal_layout(4), boundary=sliding)
    x, _ = model.run(model.embed(batch.tokens_BT[:, 4:]), state, causal_layout(4), boundary=sliding)
    second = torch.nn.functional.cross_entropy(
        model.logits(x)[0], batch.targets_BT[0, 4:], ignore_index=IGNORE, reduction="sum"
    )
    assert_same(model, total(losses), first + second)


def test_partial_core_loops_the_middle_and_writes_prelude_and_coda_once():
    model = tiny_model(["gated_deltanet"] * 3)
    batch = random_batch([[0] * 8])
    losses, _ = step(model, batch, window=4, passes=3, core=(1, 2))
    layout, empty = causal_layout(4), model.empty_state()
    x0, s = model.run(model.embed(batch.tokens_BT[:, :4]), empty, layout, first=0, last=1)
    h, s = model.run(x0, s, layout, first=1, last=2)
    y, _ = model.run(h, s, layout, first=2, last=3)
    first = torch.nn.functional.cross_entropy(model.logits(y)[0], batch.targets_BT[0, :4], reduction="sum")
    for _ in range(2):
        h, s = model.run(h, s, layout, first=1, last=2)
    _, s = model.run(h, s, layout, first=2, last=3)
    x, s = model.run(model.embed(batch.tokens_BT[:, 4:]), s, layout)
    second = torch.nn.functional.cross_entropy(
        model.logits(x)[0], batch.targets_BT[0, 4:], ignore_index=IGNORE, reduction="sum"
    )
    assert_same(model, total(losses), first + second)


def test_a_coda_carries_its_convolution_over_slept_windows():
    """It runs once a window, on the features of the last pass, so its inputs over all windows are one sequence."""
    model = tiny_model(["gated_deltanet"] * 2)
    batch = random_batch([[0] * 12], continues=[True])
    carry = Boundary(carry_conv=True)
    _, state = step(model, batch, window=4, passes=2, core=(0, 1), boundary=carry)
    s, refined = model.empty_state(), []
    for start in range(0, 12, 4):
        x = model.embed(batch.tokens_BT[:, start : start + 4])
        h, s = model.run(x, s, causal_layout(4), first=0, last=1, boundary=carry)
        h, s = model.run(h, s, causal_layout(4), first=0, last=1)
        refined.append(h)
    _, expected = model.run(torch.cat(refined, dim=1), model.empty_state(), causal_layout(12), first=1, boundary=carry)
    torch.testing.assert_close(state[1].S_BHKV, expected[1].S_BHKV, **EXACT)
    torch.testing.assert_close(state[1].conv_BWD, expected[1].conv_BWD, **EXACT)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("eviction", [Boundary(), Boundary(sliding_window=4), Boundary(carry_conv=True)])
@pytest.mark.parametrize("when", ["every", "unlabelled"])
def test_no_document_sees_another(passes, eviction, when):
    """Law 4: other tokens in one document change no bit of the loss of any other document."""
    model = tiny_model()
    documents = [[0] * 6 + [1] * 7, [PAD] * 2 + [0] * 3 + [1] * 3 + [2] * 5]
    batch = random_batch(documents, target_share=0.5 if when == "unlabelled" else 1.0)

    def document_losses(batch: Batch) -> dict[tuple[int, int], float]:
        found: dict[tuple[int, int], float] = {}

        def read(r, _first, logits, targets):
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            where = batch.targets_BT[list(r.rows), r.start : r.stop] != IGNORE
            rows = torch.tensor(r.rows)[:, None].expand_as(where)[where]
            ids = batch.documents_BT[list(r.rows), r.start : r.stop][where]
            for row, document, value in zip(rows.tolist(), ids.tolist(), each.tolist(), strict=True):
                found[row, document] = found.get((row, document), 0.0) + value

        settings = LoopSettings((0, model.num_layers), eviction)
        rounds = plan_rounds(window_facts(batch, 4), passes, when)
        run_rounds(model, batch, rounds, model.empty_state(), settings, read)
        return found

    before = document_losses(batch)
    for row, document in before:
        changed = batch.tokens_BT.clone()
        mine = batch.documents_BT[row] == document
        changed[row, mine] = (changed[row, mine] + 1) % 17
        after = document_losses(Batch(changed, *[getattr(batch, n) for n in list(batch.__dataclass_fields__)[1:]]))
        assert after[row, document] != before[row, document]
        others = {key: value for key, value in before.items() if key != (row, document)}
        assert {key: after[key] for key in others} == others
