"""The contract of every task: rows depend on seed and number, not on processes; held-out rows are not trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from sleeptrain.config.schema import DepoConfig, Rule110Config
from sleeptrain.data.batch import IGNORE, PAD, Part
from sleeptrain.data.tasks.build import build_task
from sleeptrain.data.tasks.source import TaskSource
from sleeptrain.errors import DataError
from sleeptrain.sleep.rounds import window_facts
from tests.data.tasks.batches import SMALL, equal, join, small_task

# Windows, and the number of them that hold answers.
WINDOWS = {"rule110": 11, "depo": 36, "gsm_infinite": 75}
pytestmark = pytest.mark.parametrize("name", SMALL)


def test_a_row_depends_on_seed_and_number_alone(name: str) -> None:
    expected = TaskSource(small_task(name), seed=4).batch(12)
    parts = TaskSource(small_task(name), seed=4)
    assert equal(join([parts.batch(5), parts.batch(1), parts.batch(6)]), expected)
    assert not equal(TaskSource(small_task(name), seed=5).batch(12), expected)
    assert expected.tokens_BT.shape == (12, parts.sequence)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_ranks_read_the_rows_of_one_process(name: str, ranks: int) -> None:
    source = TaskSource(small_task(name), 1)
    parts = [TaskSource(small_task(name), 1, Part(rank, ranks)) for rank in range(ranks)]
    for rows in (8, 11):
        assert equal(join([part.batch(rows) for part in parts]), source.batch(rows))
    assert all(part.state_dict() == source.state_dict() for part in parts)


def test_resume_on_another_number_of_ranks(name: str) -> None:
    source = TaskSource(small_task(name), 0)
    source.batch(7)
    state = json.loads(json.dumps(source.state_dict()))
    assert state["position"] == 7
    following = [source.batch(4) for _ in range(2)]
    other = TaskSource(small_task(name), 0, Part(1, 2))
    other.load_state_dict(state)
    assert all(equal(other.batch(4), batch.rows(2, 4)) for batch in following)


FOREIGN: dict[str, list[tuple[str, Any]]] = {
    "rule110": [("width", 12), ("strings", 2), ("steps", 8), ("boundary", "ones"), ("label", 1)],
    "depo": [("nodes", 8), ("min_nodes", 4), ("hops", 5), ("symbols", 6), ("max_word", 3), ("queries", 3)],
    "gsm_infinite": [("min_ops", 2), ("max_ops", 2), ("min_tokens", 151), ("max_tokens", 221)],
}


def test_a_state_of_other_rows_is_refused(name: str) -> None:
    state = TaskSource(small_task(name), 0).state_dict()
    with pytest.raises(DataError, match=r"data\.seed=0.*data\.seed=1"):
        TaskSource(small_task(name), 1).load_state_dict(state)
    for setting, value in FOREIGN[name]:
        other = replace(SMALL[name], **{name: replace(getattr(SMALL[name], name), **{setting: value})})
        with pytest.raises(DataError, match=rf"data\.{name}\.{setting}"):
            TaskSource(build_task(other), 0).load_state_dict(state)


def test_held_out_rows_are_fixed_and_complete(name: str) -> None:
    source = TaskSource(small_task(name), 0)
    before = list(source.validation_batches(name, 16))
    assert [len(batch.tokens_BT) for batch in before] == [16, 16, 16, 2]
    source.batch(3)
    for other in (source, TaskSource(small_task(name), 8), TaskSource(small_task(name), 0, Part(1, 2))):
        assert equal(join(list(other.validation_batches(name, 7))), join(before))
    assert [len(batch.tokens_BT) for batch in source.validation_batches(name, 16, count=2)] == [16, 16]
    assert source.state_dict()["position"] == 3


def test_rows_keep_the_contract(name: str) -> None:
    """Ids are below the vocabulary, targets are the next tokens, pads and windows of context have no target, and
    documents are the numbers of rows."""
    source = TaskSource(small_task(name), 0)
    source.skip(3)
    batch = join([source.batch(20), next(source.validation_batches(name, 20))])
    valid, has_target = batch.documents_BT != PAD, batch.targets_BT != IGNORE
    assert int(batch.tokens_BT.min()) >= 0 and int(batch.tokens_BT.max()) < source.vocab_size
    assert bool(has_target.any(1).all()) and not bool((has_target & ~valid).any())
    numbers = [*range(3, 23), *range(20)]
    for row, number in enumerate(numbers):
        assert set(batch.documents_BT[row][valid[row]].tolist()) == {number}
        last = int(valid[row].nonzero().max())
        at = [t for t in has_target[row].nonzero().flatten().tolist() if t < last]
        assert batch.targets_BT[row, at].tolist() == batch.tokens_BT[row, [t + 1 for t in at]].tolist()
    assert not batch.carried_B.any() and not batch.continues_B.any()
    facts = window_facts(batch, WINDOWS[name])
    if name != "gsm_infinite":  # its prompts have various lengths, and end in the window of the answer
        assert not any(any(fact.has_target) for fact in facts[:-1])
    assert all(sum(fact.has_target[row] for fact in facts) in (1, 2) for row in range(40))


def test_nothing_held_out_is_trained_on(name: str) -> None:
    """There are so few different rows that random rows would be on both sides."""
    few = {
        "rule110": replace(SMALL[name], rule110=Rule110Config(width=7, strings=1, steps=3, validation_samples=300)),
        "depo": replace(
            SMALL[name], depo=DepoConfig(nodes=3, hops=1, symbols=6, max_word=1, queries=1, validation_samples=200)
        ),
        "gsm_infinite": SMALL[name],
    }
    task = build_task(few[name])
    source = TaskSource(task, 0)
    trained, held_out = ({content(name, task, b, row) for b in bs for row in range(len(b.tokens_BT))} for bs in (
        [source.batch(4000 if name != "gsm_infinite" else 300)], source.validation_batches(name, 100)
    ))  # fmt: skip
    assert trained and held_out and not trained & held_out
    if name == "rule110":
        assert len(trained) + len(held_out) == 128, "all strings are on one side or the other, and all are drawn"


def content(name: str, task: Any, batch: Any, row: int) -> Any:
    """The part of a row that training must not see: the strings, the cycle as a set of edges, or the problem."""
    if name == "rule110":
        return tuple(batch.tokens_BT[row, :7].tolist())
    if name == "depo":
        names = batch.tokens_BT[row, :6].tolist()
        return frozenset(zip(names[::2], names[1::2], strict=True))
    return task.text(batch.tokens_BT[row].tolist())


def test_the_report_and_the_lines_are_numbers(name: str) -> None:
    task = small_task(name)
    assert json.loads(json.dumps(task.guessing())) == task.guessing() == small_task(name).guessing()
    assert all(value >= 0 for value in task.guessing().values()) and task.report() == {}
    assert isinstance(task.rows(0, 0, 2).tokens_BT, torch.Tensor)
