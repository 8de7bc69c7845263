"""The exact rounds of a step, for tables of (windows, N, policy, targets, documents)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.sleep.rounds import Round, WindowFacts, plan_rounds, window_facts, window_spans, windows_of


def wake(window, rows, span, silent=False, last=False):
    """A wake round: with a loss, or silent (no target); `last` where no sleep pass follows a silent one."""
    if silent:
        return Round(window, *span, 1, rows, coda=last, state_only=last)
    return Round(window, *span, 1, rows, loss=True, coda=True)


def sleeps(window, rows, span, passes, feeds_back=True):
    return [
        Round(window, *span, n, rows, feeds_back, coda=n == passes, state_only=n == passes)
        for n in range(2, passes + 1)
    ]


def facts(spans, has_target, read_later):
    return [WindowFacts(*s, tuple(t), tuple(r)) for s, t, r in zip(spans, has_target, read_later, strict=True)]


A, B, C = (0, 4), (4, 8), (8, 10)  # the last window is ragged

TABLE = {
    "every, N=1: one round a window": (
        facts([A, B], [[1], [1]], [[1], [0]]),
        dict(passes=1),
        [wake(0, (0,), A), wake(1, (0,), B)],
    ),
    "every, N=3: all windows sleep but the last, which nobody reads": (
        facts([A, B, C], [[1], [1], [1]], [[1], [1], [0]]),
        dict(passes=3),
        [wake(0, (0,), A), *sleeps(0, (0,), A, 3), wake(1, (0,), B), *sleeps(1, (0,), B, 3), wake(2, (0,), C)],
    ),
    "every: the last window sleeps where the document goes on in the next step": (
        facts([A], [[1, 1]], [[0, 1]]),
        dict(passes=2),
        [wake(0, (0, 1), A), *sleeps(0, (1,), A, 2)],
    ),
    "every: a window without targets sleeps too": (
        facts([A, B], [[0], [1]], [[1], [0]]),
        dict(passes=2),
        [wake(0, (0,), A, silent=True), *sleeps(0, (0,), A, 2), wake(1, (0,), B)],
    ),
    "unlabelled, N=4: context sleeps, the answer window gets one pass": (
        facts([A, B, C], [[0], [0], [1]], [[1], [1], [0]]),
        dict(passes=4, when="unlabelled"),
        [
            wake(0, (0,), A, silent=True),
            *sleeps(0, (0,), A, 4),
            wake(1, (0,), B, silent=True),
            *sleeps(1, (0,), B, 4),
            wake(2, (0,), C),
        ],
    ),
    "unlabelled: a target keeps a window awake even where its state is read": (
        facts([A, B], [[1], [1]], [[1], [0]]),
        dict(passes=4, when="unlabelled"),
        [wake(0, (0,), A), wake(1, (0,), B)],
    ),
    "unlabelled, rows that differ: each row has its own rule": (
        facts([A, B], [[0, 1, 0], [1, 1, 0]], [[1, 1, 0], [0, 0, 0]]),
        dict(passes=2, when="unlabelled"),
        [wake(0, (1,), A), wake(0, (0,), A, silent=True), *sleeps(0, (0,), A, 2), wake(1, (0, 1), B)],
    ),
    "unlabelled, N=1: a silent window is read for its state alone": (
        facts([A, B], [[0], [1]], [[1], [0]]),
        dict(passes=1, when="unlabelled"),
        [wake(0, (0,), A, silent=True, last=True), wake(1, (0,), B)],
    ),
    "a window that nobody reads is not run": (
        facts([A, B], [[0, 1], [0, 0]], [[0, 0], [0, 0]]),
        dict(passes=2),
        [wake(0, (1,), A)],
    ),
    "feedback none: sleep passes read the embeddings again": (
        facts([A, B], [[1], [1]], [[1], [0]]),
        dict(passes=2, feedback="none"),
        [wake(0, (0,), A), *sleeps(0, (0,), A, 2, feeds_back=False), wake(1, (0,), B)],
    ),
}


@pytest.mark.parametrize(("inputs", "settings", "expected"), TABLE.values(), ids=TABLE)
def test_rounds(inputs, settings, expected):
    assert plan_rounds(inputs, **settings) == expected


def batch(documents, targets=None, continues=None) -> Batch:
    ids = torch.tensor(documents)
    wanted = torch.tensor(targets) if targets else torch.ones_like(ids)
    carries = torch.zeros(len(documents), dtype=torch.bool)
    goes_on = torch.tensor(continues) if continues else carries
    return Batch(torch.zeros_like(ids), torch.where(wanted.bool(), 0, IGNORE), ids, carries, goes_on)


FACTS = {
    "one document over ragged windows": (batch([[0] * 10]), [[True], [True], [False]]),
    "it goes on in the next step": (batch([[0] * 10], continues=[True]), [[True], [True], [True]]),
    "a document that ends inside a window": (batch([[0] * 6 + [1] * 4]), [[True], [True], [False]]),
    "a document that ends at a boundary": (batch([[0] * 4 + [1] * 6]), [[False], [True], [False]]),
    "rows that differ": (batch([[0] * 10, [0] * 8 + [1] * 2]), [[True, True], [True, False], [False, False]]),
    "pads after the document": (batch([[0] * 5 + [PAD] * 5]), [[True], [False], [False]]),
    "pads before the document": (batch([[PAD] * 5 + [0] * 5]), [[False], [True], [False]]),
    "the end of a padded row never goes on": (batch([[0] * 4 + [PAD] * 6]), [[False], [False], [False]]),
    "a window of pads inside a document": (batch([[0] * 4 + [PAD] * 4 + [0] * 2]), [[True], [False], [False]]),
}


@pytest.mark.parametrize(("inputs", "read_later"), FACTS.values(), ids=FACTS)
def test_rows_whose_state_is_read_later(inputs, read_later):
    assert [list(f.read_later) for f in window_facts(inputs, 4)] == read_later


def test_targets_are_counted_by_window():
    inputs = batch([[0] * 10, [0] * 10], targets=[[0] * 9 + [1], [1] + [0] * 9])
    assert [f.has_target for f in window_facts(inputs, 4)] == [(False, True), (False, False), (True, False)]


WORK = {
    "documents of a wake pass, the open one of a sleep pass": (
        batch([[0] * 2 + [1] * 6]), [[[(2, 0), (2, 0)]], [[(2, 0)]], [[(4, 2)]]]
    ),
    "pads are no work": (batch([[0] * 4 + [0] * 2 + [PAD] * 2]), [[[(4, 0)]], [[(4, 0)]], [[(2, 4)]]]),
    "a row that is carried in": (
        replace(batch([[0] * 8]), carried_B=torch.tensor([True])), [[[(4, 4)]], [[(4, 4)]], [[(4, 4)]]]
    ),
    "rows that differ": (
        batch([[0] * 8, [0] * 3 + [1] * 5]),
        [[[(4, 0)], [(3, 0), (1, 0)]], [[(4, 0)], [(1, 0)]], [[(4, 4)], [(4, 1)]]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "work"), WORK.values(), ids=WORK)
def test_work_of_a_pass(inputs, work):
    rounds = plan_rounds(window_facts(inputs, 4), 2)
    assert [(r.window, r.pass_index) for r in rounds] == [(0, 1), (0, 2), (1, 1)]
    assert [[list(map(tuple, row)) for row in r.work] for r in rounds] == work
    assert all(r.executed() == r and r.executed().work is None for r in rounds)  # and they run in the same way


def test_sleep_passes_skip_the_tokens_before_the_open_documents():
    inputs = batch([[PAD] + [0] * 2 + [1] * 5, [0] * 2 + [1] * 6], continues=[True, True])
    alone = plan_rounds(window_facts(inputs.rows(0, 1), 4), 3)
    assert [(r.window, r.pass_index, r.skip, r.length) for r in alone] == [
        (0, 1, 0, 4), (0, 2, 3, 1), (0, 3, 3, 1), (1, 1, 0, 4), (1, 2, 0, 4), (1, 3, 0, 4)
    ]  # fmt: skip
    assert [r.skip for r in plan_rounds(window_facts(inputs, 4), 2)] == [0, 2, 0, 0]  # as the longest of the rows needs
    assert all(r.whole() == replace(r, skip=0) for r in alone)


def test_the_first_of_several_parts_of_the_open_document_is_not_skipped():
    inputs = batch([[1, 0, PAD, 0]], continues=[True])
    assert [r.skip for r in plan_rounds(window_facts(inputs, 4), 2)] == [0, 1]


@pytest.mark.parametrize(("ended", "multiple", "skip"), [(7, 1, 6), (7, 4, 4), (63, 1, 62), (63, 4, 60), (1, 1, 0)])
def test_sleep_passes_have_few_lengths(ended, multiple, skip):
    """Windows of 32 tokens: lengths are multiples of 2, or of the given number."""
    ids = [0] * ended + [1] * (64 - ended)
    sleep = [r for r in plan_rounds(window_facts(batch([ids], continues=[True]), 32), 2, multiple=multiple)]
    [r] = [r for r in sleep if not r.is_wake and r.start <= ended < r.stop]
    assert r.start + r.skip == skip
    assert r.length % multiple == 0


def test_windows_of_unknown_documents_are_read_whole():
    assert all(r.skip == 0 for r in plan_rounds(facts([A, B], [[1], [1]], [[1], [1]]), passes=2))


def test_ragged_last_window():
    assert window_spans(10, 4) == [A, B, C]
    assert window_spans(8, 4) == [A, B]
    assert window_spans(3, 4) == [(0, 3)]


def test_rounds_by_window():
    rounds = plan_rounds(facts([A, B, C], [[1, 1]] * 3, [[1, 1], [1, 0], [0, 0]]), passes=3)
    assert [[r.pass_index for r in group] for group in windows_of(rounds)] == [[1, 2, 3], [1, 2, 3], [1]]
