"""A second implementation of the method, row by row and document by document, without masks, resets or batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights

# Called after a pass with its number, its step (output minus input) and that of the pass before, and the memory before
# and after it; True ends the sleep.
Stops = Callable[[int, torch.Tensor, torch.Tensor | None, FastWeights, FastWeights], bool]


def never(*_: object) -> bool:
    return False


def causal_layout(num_tokens: int) -> DocumentLayout:
    return DocumentLayout(torch.zeros(1, num_tokens, dtype=torch.long), None, None, None)


def oracle_loss(
    model: Hybrid,
    batch: Batch,
    window: int,
    passes: int,
    when: str = "every",
    feedback: str = "features",
    states: list[FastWeights] | None = None,
    stops: Stops = never,
    bptt_passes: int | None = None,
) -> tuple[torch.Tensor, list[FastWeights]]:
    """Summed loss of a batch and each row's last state, under hard eviction with the whole stack as the core.

    bptt_passes: gradients flow through that many last passes of N; without stops.
    """
    total = torch.zeros((), dtype=torch.float64)
    states_after = []
    for b in range(batch.tokens_BT.shape[0]):
        state = model.empty_state()
        if states is not None and batch.carried_B[b]:
            state = states[b]
        loss, state = _row(model, batch.rows(b, b + 1), window, passes, when, feedback, state, stops, bptt_passes)
        total = total + loss
        states_after.append(state)
    return total, states_after


def _row(model, row, window, passes, when, feedback, state, stops, bptt_passes):  # type: ignore[no-untyped-def]
    tokens, targets, documents = row.tokens_BT[0], row.targets_BT[0], row.documents_BT[0]
    num_tokens = len(tokens)
    total = torch.zeros((), dtype=torch.float64)
    current = None
    for start in range(0, num_tokens, window):
        at = range(start, min(start + window, num_tokens))
        has_target = any(int(targets[t]) != IGNORE for t in at)
        runs: list[list[int]] = []
        before = state
        for t in at:
            if int(documents[t]) == PAD:
                continue
            if runs and int(documents[runs[-1][-1]]) == int(documents[t]):
                runs[-1].append(t)
            else:
                runs.append([t])
        for run in runs:
            if current is not None and int(documents[run[0]]) != current:
                state = model.empty_state()
            current = int(documents[run[0]])
            later = [int(documents[t]) for t in range(at[-1] + 1, num_tokens) if int(documents[t]) != PAD]
            goes_on = later[0] == current if later else bool(row.continues_B[0])
            x0 = model.embed(tokens[run][None])
            x, state = model.run(x0, state, causal_layout(len(run)))
            total = total + F.cross_entropy(model.logits(x)[0], targets[run], ignore_index=IGNORE, reduction="sum")
            if run is runs[-1] and goes_on and (when == "every" or not has_target):
                last_step, step = None, x - x0
                for n in range(1, passes):
                    if stops(n, step, last_step, before, state):
                        break
                    if passes - n == bptt_passes:
                        x, state = x.detach(), state.detach()
                    read, before, last_step = x if feedback == "features" else x0, state, step
                    x, state = model.run(read, state, causal_layout(len(run)))
                    step = x - read
    return total, state
