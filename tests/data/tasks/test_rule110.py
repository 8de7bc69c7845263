from __future__ import annotations

import numpy as np
import pytest
import torch

from sleeptrain.config.schema import Rule110Config
from sleeptrain.data.batch import IGNORE
from sleeptrain.data.tasks import rule110
from sleeptrain.data.tasks.rule110 import FIRST_STEPS, OUTSIDE, SEP, Rule110, draw_steps, draw_strings, evolve, labels
from sleeptrain.data.tasks.task import TRAIN, VALIDATION, Answered
from sleeptrain.errors import ConfigError

CONFIG = Rule110Config(width=11, strings=3, steps=9, validation_samples=50)


def brute_force(cells: list[int], steps: int, boundary: str = "periodic") -> list[int]:
    """Applies the rule cell by cell; the binary digits of 110 are its table."""
    for _ in range(steps):
        before, after = {"periodic": (cells[-1], cells[0]), "zeros": (0, 0), "ones": (1, 1)}[boundary]
        around = [before, *cells, after]
        width = len(cells)
        cells = [110 >> (4 * around[i] + 2 * around[i + 1] + around[i + 2]) & 1 for i in range(width)]
    return cells


@pytest.mark.parametrize("boundary", OUTSIDE)
@pytest.mark.parametrize("width", [3, 8, 20, 24, 65])
@pytest.mark.parametrize("steps", [0, 1, 2, 9, 40])
def test_evolution_matches_brute_force(width: int, steps: int, boundary: str) -> None:
    strings = np.random.default_rng(width).integers(0, 2, (13, width), np.uint8)
    expected = [brute_force(string.tolist(), steps, boundary) for string in strings]
    outside = {"periodic": None, "zeros": 0, "ones": 1}[boundary]
    assert evolve(strings.T, steps, outside).T.tolist() == expected
    for label in (0, 1, width - 1):
        config = Rule110Config(width=width, strings=1, steps=steps, boundary=boundary, label=label)
        assert labels(strings, config, steps).tolist() == [string[label] for string in expected]


def test_a_batch_holds_strings_and_labels() -> None:
    task = Rule110(CONFIG)
    batch = task.rows(0, 0, 17)
    assert task.sequence == 36 and task.vocab_size == 3
    assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.documents_BT.shape == (17, 36)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.documents_BT.dtype == torch.int64
    for tokens, targets in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True):
        labels = [brute_force(tokens[start : start + 11], 9)[0] for start in (0, 11, 22)]
        assert tokens[33:] == [SEP, *labels[:-1]]
        assert targets == [IGNORE] * 33 + labels
    assert not batch.carried_B.any() and not batch.continues_B.any()
    assert (batch.documents_BT == batch.documents_BT[:, :1]).all()


MIXED = Rule110Config(width=11, strings=2, mixed_steps=[2, 4, 8], validation_samples=50)


def test_mixed_rows_tell_their_number_of_updates_in_each_window() -> None:
    task = Rule110(MIXED)
    assert task.sequence == 26 and task.vocab_size == 6
    for batch in (task.rows(3, 100, 40), task.held_out(0, 40)):
        steps = set()
        for tokens, targets in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            assert tokens[0] == tokens[12] and tokens[24] == SEP
            t = MIXED.mixed_steps[tokens[0] - FIRST_STEPS]
            assert targets[24:] == [brute_force(tokens[start : start + 11], t)[0] for start in (1, 13)]
            steps.add(t)
        assert steps == {2, 4, 8}
    assert task.text(task.rows(0, 0, 1).tokens_BT[0, :2].tolist())[:4] == " t=" + str(
        draw_steps(MIXED, 0, TRAIN, 0, 1)[0]
    )


def test_the_numbers_of_updates_are_balanced_and_belong_to_their_row() -> None:
    steps_B = draw_steps(MIXED, 0, TRAIN, 0, 3000)
    assert all(900 < (steps_B == t).sum() < 1100 for t in (2, 4, 8))
    assert (draw_steps(MIXED, 0, TRAIN, 1000, 500) == steps_B[1000:1500]).all()
    assert (draw_steps(MIXED, 1, TRAIN, 0, 3000) != steps_B).any()
    plain = Rule110Config(width=11, strings=2, steps=4)
    assert (draw_strings(MIXED, 0, TRAIN, 0, 9) == draw_strings(plain, 0, TRAIN, 0, 9)).all(), (
        "cells do not depend on t"
    )


def test_mixed_rows_are_scored_by_their_number_of_updates() -> None:
    task = Rule110(MIXED)
    batch = task.held_out(0, 50)
    right_B = batch.tokens_BT[:, 0] != FIRST_STEPS + 1  # all but those of t=4
    predicted_BT = torch.where(right_B[:, None], batch.targets_BT, 1 - batch.targets_BT)
    metrics = task.metrics([Answered(batch, predicted_BT, torch.zeros(batch.targets_BT.shape))])
    assert metrics["accuracy_by_steps"] == {"t=2": 1.0, "t=4": 0.0, "t=8": 1.0}
    assert metrics["accuracy"] == right_B.double().mean().item()
    each = [Rule110(Rule110Config(width=11, strings=2, steps=t)).guessing() for t in MIXED.mixed_steps]
    assert task.guessing() == pytest.approx({name: sum(g[name] for g in each) / 3 for name in each[0]})


@pytest.mark.parametrize("width", [8, 11, 24, 64, 65, 200])  # one word, several words, several blocks of words
def test_cells_are_balanced_and_samples_are_independent(width: int) -> None:
    config = Rule110Config(width=width, strings=3, steps=2)
    for stream, held_out in ((TRAIN, False), (VALIDATION, True)):
        strings = draw_strings(config, 0, stream, 0, 3000, held_out)
        assert np.abs(strings.mean(0) - 0.5).max() < 0.05, "every cell is as often 1 as 0"
        assert len(np.unique(strings.reshape(3000, -1), axis=0)) > 2900
        for number in (0, 1, 777, 2999):
            assert (draw_strings(config, 0, stream, number, 1, held_out)[0] == strings[number]).all()


def test_too_few_rows_to_hold_some_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule110, "are_held_out", lambda words_BW: np.zeros(len(words_BW), bool))
    with pytest.raises(ConfigError, match=r"data\.rule110\.width=3.*too few"):
        Rule110(Rule110Config(width=3, strings=1))


def answered(right: list[list[bool]], loss: list[list[float]]) -> Answered:
    """Rows of a task of two strings, with answers that are right where `right` says so."""
    batch = Rule110(Rule110Config(width=5, strings=2)).rows(0, 0, len(right))
    predicted_BT, loss_BT = torch.full_like(batch.targets_BT, IGNORE), torch.zeros(batch.targets_BT.shape)
    predicted_BT[:, -2:] = torch.where(torch.tensor(right), batch.targets_BT[:, -2:], 1 - batch.targets_BT[:, -2:])
    loss_BT[:, -2:] = torch.tensor(loss)
    return Answered(batch, predicted_BT, loss_BT)


def test_metrics_against_a_count_by_hand() -> None:
    """There are three rows in two batches: one has both labels right, and four of six labels are right."""
    half = float(np.log(2))
    batches = [
        answered([[True, True], [True, False]], [[0.0, half], [half, half]]),
        answered([[False, True]], [[2 * half, 0.0]]),
    ]
    found = Rule110(Rule110Config(width=5, strings=2)).metrics(batches)
    assert found == pytest.approx({"accuracy": 1 / 3, "bits": 4 / 6, "sampled": (1 / 2 + 1 / 4 + 1 / 4) / 3})


@pytest.mark.parametrize(("steps", "likelier"), [(4, 0.537), (8, 0.538), (16, 0.558), (32, 0.56)])
def test_lines_of_guessing(steps: int, likelier: float) -> None:
    lines = Rule110(Rule110Config(width=24, strings=4, steps=steps)).guessing()
    assert lines["majority_bits"] == pytest.approx(likelier, abs=0.006)
    assert lines["majority"] == pytest.approx(lines["majority_bits"] ** 4)
    assert lines["chance"] == 1 / 16
    p = lines["majority_bits"]
    assert lines["sampled"] == pytest.approx((p * p + (1 - p) * (1 - p)) ** 4) and lines["sampled"] < lines["majority"]


def test_with_zeros_outside_the_first_cell_is_almost_always_one() -> None:
    fixed = Rule110Config(width=24, strings=1, steps=10, boundary="zeros")
    assert Rule110(fixed).guessing()["majority"] > 0.99


@pytest.mark.parametrize(("width", "strings"), [(24, 2), (6, 1), (8, 1)])
def test_majority_is_the_accuracy_of_constant_answers(width: int, strings: int) -> None:
    """Few cells make few held-out strings, whose labels may be far from those of all strings."""
    config = Rule110Config(width=width, strings=strings, steps=8)
    task = Rule110(config)
    batch = task.held_out(0, 20_000)
    label = int(batch.targets_BT[batch.targets_BT != IGNORE].double().mean() > 0.5)
    same_BT = torch.where(batch.targets_BT == IGNORE, IGNORE, label)
    found = task.metrics([Answered(batch, same_BT, torch.zeros(same_BT.shape))])
    assert found["accuracy"] == pytest.approx(task.guessing()["majority"], abs=0.015)
    assert found["bits"] == pytest.approx(task.guessing()["majority_bits"], abs=0.01)


def test_text() -> None:
    assert Rule110(CONFIG).text([0, 1, SEP, 1]) == "01|1"
