"""Law 4 over the real stream: the tokens of one document never change the loss of another, nor do pads.

Every layout takes several steps, each of which begins with the memory of the step before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from sleeptrain.config.schema import Config, SleepConfig, TrainConfig
from sleeptrain.data import rows
from sleeptrain.data.assignment import StreamSettings
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.stream import ShardStream
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_batch
from sleeptrain.sleep.step import MicroBatch, forward_backward, start_state, step_context
from tests.data.numbered import NumberedShards, mixture
from tests.models import VOCABULARY, tiny_config, tiny_model

LENGTHS = [[2, 3, 14], [31, 1], [5, 9, 2]]  # windows of 4: some hold three documents, some documents fill eight
WINDOW, SEQUENCE, ROWS, STEPS = 4, 10, 2, 5
EVERY_KIND = ["attention", "gated_deltanet", "mamba2", "jet", "sliding_attention"]
Documents = dict[tuple[int, int], torch.Tensor]


class ModelShards(NumberedShards):
    """Documents in the vocabulary of the model. other: the number of the document whose tokens are changed."""

    def __init__(self, other: tuple[int, int] | None = None) -> None:
        super().__init__(LENGTHS)
        self.fingerprint = "model"
        self._other = other

    def document(self, shard: int, index: int) -> np.ndarray:
        # The tokens are multiples of 8: times 7, every remainder occurs, and neighbours differ.
        tokens = super().document(shard, index) * 7 % VOCABULARY
        return (tokens + 1) % VOCABULARY if (shard, index) == self._other else tokens


@pytest.fixture(autouse=True)
def _short_stretches() -> Iterator[None]:
    with patch.object(rows, "STRETCH", 2**8):
        yield


def batches(layout: str, other: tuple[int, int] | None = None) -> list[Batch]:
    settings = StreamSettings(SEQUENCE, mixture(text=1), layout, seed=1, shuffle_shards=3)
    stream = ShardStream({"text": ModelShards(other)}, settings)  # type: ignore[dict-item]
    return [stream.batch(ROWS) for _ in range(STEPS)]


def token_losses(model: Hybrid, steps: list[Batch], passes: int) -> list[torch.Tensor]:
    """The loss of every token [B, T] in each step, nan without a target."""
    state, losses = None, []
    for batch in steps:
        rounds = plan_batch(batch, WINDOW, passes, SleepConfig(window=WINDOW))
        found = torch.full(batch.tokens_BT.shape, torch.nan, dtype=torch.float64)

        def read(
            r: Round,
            _first: int,
            logits: torch.Tensor,
            targets: torch.Tensor,
            batch: Batch = batch,
            found: torch.Tensor = found,
        ) -> None:
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none").detach()
            part = found[list(r.rows), r.start : r.stop]
            part[batch.targets_BT[list(r.rows), r.start : r.stop] != IGNORE] = each
            found[list(r.rows), r.start : r.stop] = part

        with torch.no_grad():
            begin = start_state(model, MicroBatch(0, batch, rounds), state)
            _, state = run_rounds(model, batch, rounds, begin, LoopSettings((0, model.num_layers)), read)
        losses.append(found)
    return losses


def by_document(steps: list[Batch], losses: list[torch.Tensor]) -> Documents:
    """The losses of the tokens of each document in each row that reads it, in order."""
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for batch, loss in zip(steps, losses, strict=True):
        for row in range(ROWS):
            for identity in batch.documents_BT[row].unique().tolist():
                mine = (batch.documents_BT[row] == identity) & (batch.targets_BT[row] != IGNORE)
                if identity != PAD and mine.any():
                    found.setdefault((row, identity), []).append(loss[row][mine])
    return {key: torch.cat(parts) for key, parts in found.items()}


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("layout", ["lanes", "packed", "one_document"])
def test_other_tokens_in_a_document_move_its_own_losses_only(layout: str, passes: int) -> None:
    """Each token is compared to the last bit, over several steps, for each document in turn."""
    model, steps = tiny_model(EVERY_KIND), batches(layout)
    before = by_document(steps, token_losses(model, steps, passes))
    moved_by = 0
    for other in [(shard, index) for shard, lengths in enumerate(LENGTHS) for index in range(len(lengths))]:
        changed = batches(layout, other)
        mine = {
            (row, identity)
            for old, new in zip(steps, changed, strict=True)
            for row in range(ROWS)
            for identity in old.documents_BT[row][old.tokens_BT[row] != new.tokens_BT[row]].tolist()
        }
        after = by_document(changed, token_losses(model, changed, passes))
        assert after.keys() == before.keys()
        for key, losses in before.items():
            if key not in mine:
                assert torch.equal(after[key], losses), (other, key)
            else:
                assert not (after[key] == losses).any(), (other, key)
                moved_by += 1
    assert moved_by >= len(before)


def test_the_batches_exercise_the_law() -> None:
    """Two documents in one window; one document over three windows, and over steps."""
    shared = spanning = carried = 0
    for batch in batches("lanes"):
        carried += int(batch.carried_B.sum())
        for row in batch.documents_BT.tolist():
            windows = [set(row[start : start + WINDOW]) for start in range(0, SEQUENCE, WINDOW)]
            shared += sum(len(window) > 1 for window in windows)
            spanning += sum(all(identity in window for window in windows) for identity in set(row))
    assert shared >= 3 and spanning >= 3 and carried >= 3
    assert any((batch.documents_BT == PAD).any() for batch in batches("one_document"))


@pytest.mark.parametrize("passes", [1, 3])
def test_a_document_remembers_its_own_earlier_windows(passes: int) -> None:
    """The law does not hold only because nothing is carried: a token of one step changes losses of the next."""
    model, steps = tiny_model(EVERY_KIND), batches("lanes")
    before = token_losses(model, steps, passes)
    at = next(i for i, batch in enumerate(steps) if batch.carried_B.any() and (batch.documents_BT[:, :1] >= 0).all())
    row = int(steps[at].carried_B.nonzero()[0])
    assert steps[at - 1].documents_BT[row, -1] == steps[at].documents_BT[row, 0]
    tokens = steps[at - 1].tokens_BT.clone()
    tokens[row, -1] = (tokens[row, -1] + 1) % VOCABULARY
    changed = [*steps[: at - 1], replace(steps[at - 1], tokens_BT=tokens), *steps[at:]]
    after = token_losses(model, changed, passes)
    mine = (steps[at].documents_BT[row] == steps[at].documents_BT[row, 0]) & (steps[at].targets_BT[row] != IGNORE)
    assert mine.any() and not (after[at][row][mine] == before[at][row][mine]).any()
    assert torch.equal(after[at][1 - row].nan_to_num(), before[at][1 - row].nan_to_num())


@pytest.mark.parametrize("passes", [1, 3])
def test_nobody_reads_the_tokens_at_pads(passes: int) -> None:
    """Losses, gradients and the last memory are equal to the last bit, over steps of `one_document`."""
    config = Config(
        model=tiny_config(EVERY_KIND), sleep=SleepConfig(window=WINDOW, passes=passes), train=TrainConfig(tokens=1)
    )
    steps = batches("one_document")
    generator = torch.Generator().manual_seed(0)
    garbage = []
    for batch in steps:
        noise = torch.randint(VOCABULARY, batch.tokens_BT.shape, generator=generator)
        garbage.append(replace(batch, tokens_BT=torch.where(batch.documents_BT == PAD, noise, batch.tokens_BT)))
    assert any(not torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(steps, garbage, strict=True))

    def trained(steps_read: list[Batch]) -> tuple[list[float], list[torch.Tensor]]:
        model, state, losses = tiny_model(EVERY_KIND), None, []
        shape = StepShape(passes, WINDOW, ROWS)
        context = step_context(config, shape, model)
        for batch in steps_read:
            result = forward_backward(context, model, batch, shape, state)
            losses.append(result.loss)
            state = result.state
        return losses, [p.grad for p in model.parameters() if p.grad is not None]

    (losses, gradients), (losses_too, gradients_too) = trained(steps), trained(garbage)
    assert losses == losses_too and len(gradients) > 10
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_too, strict=True))
