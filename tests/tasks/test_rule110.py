from __future__ import annotations

import numpy as np
import pytest
import torch

from sleeptrain.config.schema import Rule110Config
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.tasks.rule110 import (
    SEP,
    Rule110Source,
    evolve,
    exact_accuracy,
    first_cells,
    majority_accuracy,
)

CONFIG = Rule110Config(width=11, strings=3, steps=9, validation_samples=50)


def brute_force(cells: list[int], steps: int) -> list[int]:
    """The rule's table read off the digits of 110, one cell at a time."""
    for _ in range(steps):
        width = len(cells)
        cells = [110 >> (4 * cells[i - 1] + 2 * cells[i] + cells[(i + 1) % width]) & 1 for i in range(width)]
    return cells


@pytest.mark.parametrize("width", [3, 8, 20, 24, 65])
@pytest.mark.parametrize("steps", [0, 1, 2, 9, 40])
def test_evolution_matches_brute_force(width: int, steps: int) -> None:
    strings = np.random.default_rng(width).integers(0, 2, (13, width), np.uint8)
    expected = [brute_force(string.tolist(), steps) for string in strings]
    assert evolve(strings.T, steps).T.tolist() == expected
    assert first_cells(strings, steps).tolist() == [string[0] for string in expected]


def test_batch_is_the_task() -> None:
    source = Rule110Source(CONFIG, seed=0)
    batch = source.batch(17)
    assert source.sequence == 36 and source.window == 11 and source.vocab_size == 3
    assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.documents_BT.shape == (17, 36)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.documents_BT.dtype == torch.int64
    for tokens, targets in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True):
        labels = [brute_force(tokens[start : start + 11], 9)[0] for start in (0, 11, 22)]
        assert tokens[33:] == [SEP, *labels[:-1]]
        assert targets == [IGNORE] * 33 + labels
    assert not batch.carried_B.any() and not batch.continues_B.any()
    assert (batch.documents_BT == batch.documents_BT[:, :1]).all()


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in Batch.__dataclass_fields__)


def join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in Batch.__dataclass_fields__))


@pytest.mark.parametrize("width", [11, 200])  # also where a sample takes more than one block of random bits
def test_sample_depends_on_seed_and_number_alone(width: int) -> None:
    config = Rule110Config(width=width, strings=3, steps=2)
    whole = Rule110Source(config, seed=4).batch(12)
    parts = Rule110Source(config, seed=4)
    assert equal(join([parts.batch(5), parts.batch(1), parts.batch(6)]), whole)
    assert not equal(Rule110Source(config, seed=5).batch(12), whole)


def test_samples_are_fresh() -> None:
    source = Rule110Source(Rule110Config(width=24, strings=4), seed=0)
    rows = torch.cat([source.batch(256).tokens_BT for _ in range(8)])
    held_out = torch.cat([batch.tokens_BT for batch in source.validation_batches("rule110", 256)])
    assert len(torch.cat([rows, held_out])[:, :96].unique(dim=0)) == len(rows) + len(held_out)
    assert abs(rows[:, :96].double().mean() - 0.5) < 0.01


def test_resume() -> None:
    source = Rule110Source(CONFIG, seed=0)
    source.batch(7)
    state = source.state_dict()
    assert state["position"] == 7
    following = [source.batch(4) for _ in range(3)]
    other = Rule110Source(CONFIG, seed=0)
    other.load_state_dict(state)
    assert all(equal(other.batch(4), batch) for batch in following)


def test_foreign_state_is_refused() -> None:
    state = Rule110Source(CONFIG, seed=0).state_dict()
    with pytest.raises(DataError, match=r"data\.seed=0.*data\.seed=1"):
        Rule110Source(CONFIG, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.rule110\.width"):
        Rule110Source(Rule110Config(width=12, strings=3, steps=9), seed=0).load_state_dict(state)


def test_validation_is_fixed_and_complete() -> None:
    source = Rule110Source(CONFIG, seed=0)
    before = list(source.validation_batches("rule110", 16))
    assert [len(batch.tokens_BT) for batch in before] == [16, 16, 16, 2]
    source.batch(3)
    other = Rule110Source(CONFIG, seed=8)
    for again in (source.validation_batches("rule110", 16), other.validation_batches("rule110", 16)):
        assert all(equal(left, right) for left, right in zip(before, again, strict=True))
    assert equal(join(list(source.validation_batches("rule110", 7))), join(before))
    assert [len(batch.tokens_BT) for batch in source.validation_batches("rule110", 16, count=2)] == [16, 16]
    assert source.state_dict()["position"] == 3


@pytest.mark.parametrize("steps", [8, 16, 32])
def test_prior_of_the_first_cell(steps: int) -> None:
    one = majority_accuracy(Rule110Config(width=24, strings=1, steps=steps))
    assert 0.535 < one < 0.57
    assert majority_accuracy(Rule110Config(width=24, strings=4, steps=steps)) == pytest.approx(one**4, rel=0.02)


def test_majority_is_what_constant_answers_get() -> None:
    config = Rule110Config(width=24, strings=2, steps=8, validation_samples=20_000)
    labels_BS = torch.cat(
        [batch.targets_BT[:, -2:] for batch in Rule110Source(config, 0).validation_batches("rule110", 4000)]
    )
    ones_BSV = torch.tensor([0.0, 1.0, -1.0]).expand(*labels_BS.shape, 3)
    assert exact_accuracy(ones_BSV, labels_BS) == pytest.approx(majority_accuracy(config), abs=0.015)


def test_exact_accuracy_counts_whole_rows() -> None:
    labels_BS = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
    answers_BS = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]])
    assert exact_accuracy(torch.nn.functional.one_hot(answers_BS, 3).float(), labels_BS) == 0.5


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Rule110Config(width=2), "width=2"),
        (Rule110Config(strings=0), "strings=0"),
        (Rule110Config(steps=0), "steps=0"),
        (Rule110Config(validation_samples=0), "validation_samples=0"),
        (Rule110Config(width=4, strings=5), "strings=5"),
    ],
)
def test_shapes_without_sense_are_refused(config: Rule110Config, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.rule110\.{name}"):
        Rule110Source(config, 0)
