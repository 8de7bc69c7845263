"""Reading in pieces, each row at its own position, against the training loop over the full text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, pairwise, product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sleeptrain.config.schema import SleepConfig
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep import live as live_module
from sleeptrain.sleep.live import begin, read
from tests.models import VOCABULARY, tiny_model
from tests.sleep.gates import a_gate, gated_settings
from tests.sleep.trained import texts, trained_decisions, trained_logits

EXACT = dict(rtol=1e-9, atol=1e-10)


def live_logits(
    model: Hybrid, rows: list[torch.Tensor], sleep: SleepConfig, pieces: Sequence[int], predicts_from=0, gate=None
):
    """The logits of texts that are read in pieces of at most these sizes, row by row in turn."""
    live, found = begin(model, len(rows)), [torch.empty(0, VOCABULARY, dtype=torch.float64) for _ in rows]
    sizes = cycle(pieces)
    while any(len(f) < len(row) for f, row in zip(found, rows, strict=True)):
        counts = []
        for row, f, filled in zip(rows, found, live.filled, strict=True):
            counts.append(min(next(sizes), len(row) - len(f), sleep.window - filled))
        if not any(counts):
            continue
        tokens = torch.zeros(len(rows), max(counts), dtype=torch.long)
        for b, n in enumerate(counts):
            tokens[b, :n] = rows[b][len(found[b]) : len(found[b]) + n]
        predicts = [len(f) + n > predicts_from for f, n in zip(found, counts, strict=True)]
        x, live = read(model, live, tokens, counts, predicts, sleep, gate)
        found = [torch.cat([f, model.logits(x[b, :n])]) for b, (f, n) in enumerate(zip(found, counts, strict=True))]
    return found, live


def compare(model: Hybrid, rows: list[torch.Tensor], sleep: SleepConfig, pieces: Sequence[int]) -> None:
    with torch.no_grad():
        found, live = live_logits(model, rows, sleep, pieces)
    for ours, expected in zip(found, trained_logits(model, rows, sleep), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    assert live.boundaries == tuple(len(row) // sleep.window for row in rows)


STACKS = {
    "all mixers": None,
    "gated deltanet": ["attention", "gated_deltanet", "attention"],
    "mamba2": ["mamba2", "attention"],
    "jet": ["jet", "sliding_attention", "attention"],
    "lesser reach": ["sliding_attention", "gated_deltanet", "sliding_attention"],
    "no attention": ["gated_deltanet", "mamba2"],
    "transformer": ["attention", "attention"],
}
PIECES = {"a token": [1], "whole windows": [4], "uneven": [3, 1, 2, 4, 1]}
CASES = {
    "plain": {},
    "sliding": {"eviction": "sliding"},
    "no feedback": {"feedback": "none"},
    "conv carried": {"conv_state": "carry"},
    "all": {"eviction": "sliding", "conv_state": "carry"},
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("passes", [1, 3])
def test_equals_the_training_loop(case, passes, pieces):
    model = tiny_model()
    compare(model, texts([11, 11]), SleepConfig(passes=passes, window=4, **case), pieces)
    compare(model, texts([3, 13, 8, 16]), SleepConfig(passes=passes, window=4, **case), pieces)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_every_stack(stack, eviction):
    compare(tiny_model(stack), texts([9, 14]), SleepConfig(passes=2, window=4, eviction=eviction), [1, 3])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_options_of_blocks(case):
    layers = ["sliding_attention", "jet", "attention", "gated_deltanet"]
    options = {"sandwich_norms": True, "norm_between_passes": True, "mixer_only": [1], "norm": "plain"}
    compare(tiny_model(layers, **options), texts([9, 14]), SleepConfig(passes=3, window=4, **case), [1, 3])


@pytest.mark.parametrize(("case", "core"), list(product(CASES, [[1, 3], [0, 2], [2, 4], [1, 2]])), ids=str)
def test_partial_loop(case, core):
    layers = ["gated_deltanet", "attention", "mamba2", "attention", "gated_deltanet"]
    sleep = SleepConfig(passes=3, window=4, core=core, **CASES[case])
    compare(tiny_model(layers), texts([9, 14]), sleep, [2, 1, 4])
    compare(tiny_model(layers), texts([12]), sleep, [1])


RULES = {
    "change": {"stop": "change", "stop_threshold": 0.8},
    "acceleration": {"stop": "acceleration", "stop_threshold": 0.65, "eviction": "sliding"},
    "in the middle": {"stop": "change", "stop_threshold": 0.8, "core": [1, 3], "min_passes": 2},
}


@pytest.mark.parametrize("case", RULES)
def test_rows_stop_as_in_the_training_loop(case):
    model, rows = tiny_model(), texts([13, 9, 18, 16])
    sleep, taken = SleepConfig(passes=4, window=4, **RULES[case]), set()
    compare(model, rows, sleep, [3, 1, 4])
    with torch.no_grad():
        for length in (4, 8, 12, 16):
            _, live = live_logits(model, [row[:length] for row in rows], sleep, [4])
            taken |= set(live.passes)
    assert len(taken) > 1, f"all rows took {taken} passes"


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_gate_decides_as_in_the_training_loop(eviction, tmp_path):
    model, rows = tiny_model(), texts([13, 9, 18, 16])
    sleep = gated_settings(model, rows, tmp_path / "gate.safetensors", eviction=eviction)
    compare(model, rows, sleep, [3, 1, 4])
    expected = trained_decisions(model, rows, sleep).passes_KB
    held = replace(sleep, stop_gate="")  # as an exported model, which holds its gate
    with torch.no_grad():
        for window in (0, 1, 2):
            whole = [b for b, row in enumerate(rows) if len(row) > 4 * (window + 1)]  # the last window does not sleep
            read_so_far = [rows[b][: 4 * (window + 1)] for b in whole]
            for settings, gate in ((sleep, None), (held, a_gate())):
                _, live = live_logits(model, read_so_far, settings, [4], gate=gate)
                assert list(live.passes) == [expected[window][b] for b in whole]


def work(sleep: SleepConfig, filled: int) -> tuple[int, int]:
    """(blocks run, FLOPs) of one token after `filled` tokens of a window, with the sleep that may follow."""
    model, [row], blocks = tiny_model(), texts([4]), list[object]()
    with torch.no_grad():
        _, live = live_logits(model, [row[:filled]], sleep, [1])
        for block in model.blocks.children():
            block.register_forward_hook(lambda block, *_: blocks.append(block))
        with FlopCounterMode(display=False) as counter:
            _, live = read(model, live, row[None, filled : filled + 1], [1], [True], sleep)
    return len(blocks), counter.get_total_flops()


@pytest.mark.parametrize("stop", ["change", "acceleration"])
def test_a_rule_leaves_tokens_as_they_are_and_a_sleep_costs_the_passes_that_it_takes(stop):
    """Counted in work: a token inside a window costs the same, and the one that fills it the passes of the sleep."""
    fixed = SleepConfig(passes=4, window=4)
    layers = tiny_model().num_layers
    # A rule with so high a threshold ends a sleep after `least` passes; `acceleration` has no score after the first.
    least = [n for n in (1, 2, 3) if n > 1 or stop == "change"]
    ruled = {n: SleepConfig(passes=4, window=4, stop=stop, stop_threshold=1e9, min_passes=n) for n in least}
    ruled[4] = SleepConfig(passes=4, window=4, stop=stop)
    assert {work(sleep, 2) for sleep in ruled.values()} == {work(fixed, 2)}
    assert work(fixed, 2)[0] == layers
    at_end = {n: work(sleep, 3) for n, sleep in ruled.items()}
    assert {n: blocks for n, (blocks, _) in at_end.items()} == {n: n * layers for n in ruled}
    assert at_end[4] == work(fixed, 3), "a rule that ends no sleep costs no more than none"
    flops = [at_end[n][1] for n in least]
    assert len({b - a for a, b in pairwise(flops)}) == 1 and flops == sorted(flops), (
        "each pass costs as much as another"
    )


@pytest.mark.parametrize("predicts_from", [0, 3, 4, 6, 9])
def test_under_unlabelled_only_windows_that_predict_nothing_sleep(predicts_from):
    model, rows = tiny_model(), texts([15])
    sleep = SleepConfig(passes=3, window=4, when="unlabelled")
    with torch.no_grad():
        found, _ = live_logits(model, rows, sleep, [1], predicts_from)
    expected = trained_logits(model, rows, sleep, predicts_from)[0][predicts_from:]
    torch.testing.assert_close(found[0][predicts_from:], expected, **EXACT)


def test_each_boundary_is_crossed_once_by_each_row(monkeypatch):
    seen = []

    def recorded(context, num_rows, r, *rest):  # type: ignore[no-untyped-def]
        seen.append((len(r.rows), r.pass_index))
        return run_on_rows(context, num_rows, r, *rest)

    run_on_rows = live_module.run_on_rows
    monkeypatch.setattr(live_module, "run_on_rows", recorded)
    with torch.no_grad():
        _, live = live_logits(tiny_model(), texts([3, 13, 8]), SleepConfig(passes=3, window=4), [1])
    assert live.boundaries == (0, 3, 2)
    # The rows with two boundaries in common cross them together.
    assert seen == [(2, 2), (2, 3), (2, 2), (2, 3), (1, 2), (1, 3)]


def test_rows_are_copies():
    model, rows, sleep = tiny_model(), texts([6, 6]), SleepConfig(passes=2, window=4, eviction="sliding")
    with torch.no_grad():
        _, live = live_logits(model, rows, sleep, [1])
        twice = live.rows([1, 1])
        token = torch.tensor([[3], [4]])
        first, _ = read(model, twice, token, [1, 1], [True, True], sleep)
        again, _ = read(model, live, token, [1, 1], [True, True], sleep)
    torch.testing.assert_close(first[1], again[1], **EXACT)
    assert not torch.allclose(first[0], again[0])


def test_the_number_of_passes_may_change_from_window_to_window():
    model, rows = tiny_model(), texts([12])
    live = begin(model, 1)
    with torch.no_grad():
        for start, passes in ((0, 3), (4, 1), (8, 2)):
            x, live = read(model, live, rows[0][None, start : start + 4], [4], [True], SleepConfig(passes, 4))
    once, thrice = (trained_logits(model, rows, SleepConfig(passes, 4))[0] for passes in (1, 3))
    assert not torch.allclose(model.logits(x)[0], once[8:])
    assert not torch.allclose(model.logits(x)[0], thrice[8:])


def test_kept_memory_does_not_grow():
    model, sleep = tiny_model(), SleepConfig(passes=2, window=4, eviction="sliding")
    sizes = set()
    with torch.no_grad():
        for length in (9, 41):
            _, live = live_logits(model, texts([length]), sleep, [3])
            tensors = [*live.state.to_state_dict().values(), *live.at_start.to_state_dict().values()]
            sizes.add(sum(t.numel() for t in tensors))
    assert len(sizes) == 1
