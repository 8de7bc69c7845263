"""The round plan: which (window, pass) pairs a step runs, on which rows, and for what purpose.

It is the only description of a step. The training loop, the recompute policy, the FLOP counter and the log line all
read it, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from sleeptrain.config.schema import SleepConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import state_only_end

SLEEP_LENGTHS = 16  # the most lengths of sleep passes: for each, kernels are tuned and code may be compiled


class Stretch(NamedTuple):
    """A document's tokens in one window of a row.

    tokens: the number of its tokens in the window.
    before: the number of its tokens in the previous window.
    """

    tokens: int
    before: int = 0


@dataclass(frozen=True)
class Round:
    """One pass over one window.

    window: index of the window.
    start, stop: the window holds the tokens [start, stop) of a row.
    pass_index: 1 is the wake pass, 2..N are sleep passes.
    rows: indices of the rows of the batch that take part, ascending.
    feeds_back: the blocks read the features of the previous pass, not the embeddings.
    loss: the targets of the window are predicted.
    coda: the blocks after the core run (for a loss, or because this is the window's last pass).
    state_only: nobody reads the features, only the state.
    detached: no gradient flows to the features and the memory that the core left in the pass before
        (`sleep.bptt_passes`).
    skip: the pass leaves out the window's first `skip` tokens, which are pads in a sleep pass: their documents ended.
    work: the documents that the pass works on, by row: in a wake pass all documents of the window, in a sleep pass the
        document that is open at the window's end. All other tokens are pads. None: all tokens, as one document. It is
        not compared: rounds that differ only in work run alike.
    """

    window: int
    start: int
    stop: int
    pass_index: int
    rows: tuple[int, ...]
    feeds_back: bool = False
    loss: bool = False
    coda: bool = False
    state_only: bool = False
    detached: bool = False
    skip: int = 0
    work: tuple[tuple[Stretch, ...], ...] | None = field(default=None, compare=False)

    @property
    def is_wake(self) -> bool:
        return self.pass_index == 1

    @property
    def length(self) -> int:
        """The tokens of a row that the pass computes."""
        return self.stop - self.start - self.skip

    def executed(self) -> Round:
        """The same round in which pads count as work, since they are computed like other tokens."""
        return replace(self, work=None)

    def whole(self) -> Round:
        """The same round over the whole window."""
        return replace(self, skip=0)


@dataclass(frozen=True)
class WindowFacts:
    """The facts about one window that the plan needs, row by row.

    start, stop: the window holds the tokens [start, stop) of a row.
    has_target[b]: the row has at least one target in the window.
    read_later[b]: the document that is open at the window's end continues after it, in this step or the next: its state
        will be read.
    ended[b]: the number of tokens in the window before the document that is open at its end; the tuple is empty if they
        are not known.
    documents[b]: the row's documents in order, without pads; the tuple is empty if they are not known.
    """

    start: int
    stop: int
    has_target: tuple[bool, ...]
    read_later: tuple[bool, ...]
    ended: tuple[int, ...] = ()
    documents: tuple[tuple[Stretch, ...], ...] = ()

    def work(self, rows: Sequence[int], sleeping: bool) -> tuple[tuple[Stretch, ...], ...] | None:
        """The documents that a wake or sleep pass over these rows works on; None if they are not known."""
        if not self.documents:
            return None
        return tuple(self.documents[b][-1:] if sleeping else self.documents[b] for b in rows)

    def skip(self, rows: Sequence[int], multiple: int) -> int:
        """The number of tokens before the open documents of all these rows, cut to `SLEEP_LENGTHS` lengths at most.

        multiple: divides the lengths if it divides that of the window.
        """
        if not self.ended or not rows:
            return 0
        unit = max((self.stop - self.start) // SLEEP_LENGTHS // multiple, 1) * multiple
        return min(self.ended[b] for b in rows) // unit * unit


def round_layers(r: Round, layers: Sequence[str], core: tuple[int, int], sliding: bool) -> range:
    """The blocks that a round runs: a wake round from the first block on, a sleep round from the core on.

    A round with `coda` ends at the last block, another at the core's end. `state_only` drops trailing blocks that leave
    no state.
    layers: each block's mixer. core: the blocks [first, last) that sleep passes repeat. sliding: eviction is sliding.
    """
    first, last = 0 if r.is_wake else core[0], len(layers) if r.coda else core[1]
    return range(first, state_only_end(layers, first, last, sliding) if r.state_only else last)


def window_spans(sequence: int, window: int) -> list[tuple[int, int]]:
    """[start, stop) of each window of a row; the last one is shorter if `window` does not divide `sequence`."""
    return [(start, min(start + window, sequence)) for start in range(0, sequence, window)]


def window_facts(batch: Batch, window: int) -> list[WindowFacts]:
    """The facts of every window of a batch (on the CPU)."""
    valid = batch.documents_BT != PAD
    following = _next_valid_document(batch)
    documents = _documents(batch, window)
    facts = []
    for index, (start, stop) in enumerate(window_spans(batch.tokens_BT.shape[1], window)):
        position = torch.arange(start, stop)
        last = torch.where(valid[:, start:stop], position, -1).amax(dim=1)
        open_document = batch.documents_BT.gather(1, last.clamp(min=0)[:, None]).squeeze(1)
        read_later = (last >= 0) & (open_document == following[:, stop - 1])
        has_target = (batch.targets_BT[:, start:stop] != IGNORE).any(dim=1)
        is_open = batch.documents_BT[:, start:stop] == open_document[:, None]
        ended = torch.where(last >= 0, is_open.int().argmax(dim=1), 0)
        by_row = tuple(has_target.tolist()), tuple(read_later.tolist()), tuple(ended.tolist())
        facts.append(WindowFacts(start, stop, *by_row, tuple(map(tuple, documents[index]))))
    return facts


def _documents(batch: Batch, window: int) -> list[list[list[Stretch]]]:
    """The documents in each window, by window and row. Before a carried row the previous window was a full one."""
    num_rows, num_tokens = batch.tokens_BT.shape
    row, position = (batch.documents_BT != PAD).nonzero(as_tuple=True)
    # Row, window and document of each token.
    keys = torch.stack([row, position // window, batch.documents_BT[row, position]])
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    starts = begins.nonzero().squeeze(1)
    counts = torch.diff(starts, append=starts.new_tensor([len(row)]))
    documents: list[list[list[Stretch]]] = [[[] for _ in range(num_rows)] for _ in window_spans(num_tokens, window)]
    carried, last = batch.carried_B.tolist(), (-1, -1, -1, 0)
    for b, index, document, tokens in zip(*keys[:, starts].tolist(), counts.tolist(), strict=True):
        before = last[3] if last[:3] == (b, index - 1, document) else 0
        if last[0] != b and carried[b]:
            before = window
        documents[index][b].append(Stretch(tokens, before))
        last = (b, index, document, tokens)
    return documents


def _next_valid_document(batch: Batch) -> torch.Tensor:
    """[B, T]: the document of the first valid token after each position; at the end the continuing document, or PAD."""
    num_tokens = batch.documents_BT.shape[1]
    valid = batch.documents_BT != PAD
    position = torch.arange(num_tokens).expand_as(valid)
    last = torch.where(valid, position, -1).amax(dim=1)
    last_document = batch.documents_BT.gather(1, last.clamp(min=0)[:, None]).squeeze(1)
    after_row = torch.where(batch.continues_B & (last >= 0), last_document, PAD)
    documents = torch.cat([batch.documents_BT, after_row[:, None]], dim=1)
    first_valid = torch.where(documents != PAD, torch.arange(num_tokens + 1), num_tokens)
    next_valid = first_valid.flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    return documents.gather(1, next_valid)


# N for all rows and windows; or, where a stop rule has decided, the passes of each row in each window, [K][B].
Passes = int | Sequence[Sequence[int]]


def plan_rounds(
    facts: Sequence[WindowFacts],
    passes: Passes,
    when: str = "every",
    feedback: str = "features",
    multiple: int = 1,
    bptt_passes: int | None = None,
) -> list[Round]:
    """The rounds of a step, in the order in which one process runs them.

    facts: the facts of each window.
    passes: N, which includes the wake pass. A row that does not sleep in a window gets one pass, whatever it says.
    when: `every` (each window wakes, and sleeps if its state is read later) or `unlabelled` (Algorithm 1 of arXiv
        2605.26099: windows with a target get one pass, the others N).
    feedback: `features` | `none`.
    multiple: divides the number of tokens of sleep passes if it divides those of windows.
    bptt_passes: gradients flow through at most this many last passes of a row's sleep; None: through all.

    A row takes part in a window only if the result is read: by a loss, or as the state of a later window.
    """
    rounds: list[Round] = []
    for index, fact in enumerate(facts):
        limits = [passes] * len(fact.has_target) if isinstance(passes, int) else passes[index]
        rounds += _wake_rounds(index, fact, limits)
        rounds += _sleep_rounds(index, fact, limits, when, feedback, multiple, bptt_passes)
    return rounds


def _wake_rounds(index: int, fact: WindowFacts, limits: Sequence[int]) -> list[Round]:
    rows, span = range(len(fact.has_target)), (index, fact.start, fact.stop)
    rounds = []
    predicted = tuple(b for b in rows if fact.has_target[b])
    if predicted:
        work = fact.work(predicted, sleeping=False)
        rounds.append(Round(*span, 1, predicted, loss=True, coda=True, work=work))
    silent = [b for b in rows if fact.read_later[b] and not fact.has_target[b]]
    for only in (False, True):
        part = tuple(b for b in silent if (limits[b] == 1) == only)
        if part:
            work = fact.work(part, sleeping=False)
            rounds.append(Round(*span, 1, part, coda=only, state_only=only, work=work))
    return rounds


def _sleep_rounds(
    index: int,
    fact: WindowFacts,
    limits: Sequence[int],
    when: str,
    feedback: str,
    multiple: int,
    bptt_passes: int | None,
) -> list[Round]:
    """Rows for which a pass is the last one have a round of their own, since they run the coda and leave the state. So
    have those for which it is the first through which gradients flow."""
    rows = range(len(fact.has_target))
    sleeping = tuple(b for b in rows if fact.read_later[b] and (when == "every" or not fact.has_target[b]))
    skip, rounds = fact.skip(sleeping, multiple), []
    for n in range(2, max((limits[b] for b in sleeping), default=1) + 1):
        parts: dict[tuple[bool, bool], list[int]] = {}
        for b in sleeping:
            if limits[b] >= n:
                detached = bptt_passes is not None and limits[b] - n + 1 == bptt_passes
                parts.setdefault((limits[b] == n, detached), []).append(b)
        for (is_last, detached), part in sorted(parts.items()):
            sleep = Round(index, fact.start, fact.stop, n, tuple(part), feedback == "features", skip=skip)
            work = fact.work(part, sleeping=True)
            rounds.append(replace(sleep, coda=is_last, state_only=is_last, detached=detached, work=work))
    return rounds


def plan_batch(batch: Batch, window: int, passes: Passes, sleep: SleepConfig, multiple: int = 1) -> list[Round]:
    """The rounds of a batch (on the CPU) with the configured policy and feedback. passes, multiple: as in
    `plan_rounds`."""
    facts = window_facts(batch, window)
    return plan_rounds(facts, passes, sleep.when, sleep.feedback, multiple, sleep.bptt_passes)


def windows_of(rounds: Iterable[Round]) -> list[list[Round]]:
    """The rounds grouped by window, in order."""
    groups: dict[int, list[Round]] = {}
    for r in rounds:
        groups.setdefault(r.window, []).append(r)
    return list(groups.values())
