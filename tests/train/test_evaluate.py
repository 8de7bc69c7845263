from __future__ import annotations

import pytest
import torch

from sleeptrain.data.batch import IGNORE
from sleeptrain.model.layout import first_of_document, window_layout
from sleeptrain.train.evaluate import evaluate
from tests.models import random_batch, tiny_model
from tests.sleep.oracle import oracle_loss
from tests.train.test_step import config


def batches():
    """Different numbers of targets in each, so that means of means would be wrong."""
    return [
        random_batch([[0] * 11, [0] * 3 + [1] * 8], seed=0, target_share=1.0),
        random_batch([[0] * 11], seed=1, target_share=0.3),
    ]


@pytest.mark.parametrize("passes", [1, 3])
def test_every_token_of_a_window_counts_the_same(passes):
    model, given = tiny_model(), batches()
    losses = evaluate(model, {"text": given}, config(), 4, [passes], count_answers=False)["loss"][str(passes)]
    counts = [sum(int((b.targets_BT[:, s : s + 4] != IGNORE).sum()) for b in given) for s in range(0, 11, 4)]
    total = sum(oracle_loss(model, b, 4, passes)[0] for b in given)
    torch.testing.assert_close(sum(x * n for x, n in zip(losses, counts, strict=True)), float(total.detach()))


def test_a_window_without_targets_has_no_loss():
    batch = random_batch([[0] * 8])
    batch.targets_BT[:, :4] = IGNORE
    losses = evaluate(tiny_model(), {"text": [batch]}, config(), 4, [1, 2], count_answers=False)["loss"]
    assert losses["1"][0] is None and losses["2"][0] is None and losses["2"][1] > 0


def test_a_row_is_right_when_all_its_answers_are():
    """Against logits computed row by row: two answers a row, some rows made right by taking the model's own."""
    model = tiny_model(["gated_deltanet"])
    batch = random_batch([[b] * 6 for b in range(6)], target_share=0.0)
    with torch.no_grad():
        x, _ = model.run(
            model.embed(batch.tokens_BT),
            model.empty_state(),
            window_layout(batch.documents_BT, first_of_document(batch.documents_BT)),
        )
        best = model.logits(x).argmax(-1)
    batch.targets_BT[:, -2:] = best[:, -2:]
    batch.targets_BT[4:, -1] = (best[4:, -1] + 1) % 17  # one of two answers wrong
    result = evaluate(model, {"task": [batch]}, config(sleep__when="unlabelled"), 6, [1], count_answers=True)
    assert result["accuracy"]["1"] == pytest.approx(4 / 6)


def test_several_sets_are_told_apart_and_summed_up_by_their_targets():
    model, (first, second) = tiny_model(), batches()
    both = evaluate(model, {"a": [first], "b": [second]}, config(), 4, [1, 2], count_answers=False)
    for name, batch in (("a", first), ("b", second)):
        alone = evaluate(model, {name: [batch]}, config(), 4, [1, 2], count_answers=False)
        assert "sets" not in alone
        assert both["sets"][name] == alone
    together = evaluate(model, {"both": [first, second]}, config(), 4, [1, 2], count_answers=False)
    for passes, losses in together["loss"].items():
        assert both["loss"][passes] == pytest.approx(losses)
