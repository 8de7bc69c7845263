"""Rows of problems: the question, the context, and the answer to predict."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from sleeptrain.config.schema import GsmInfiniteConfig
from sleeptrain.data.batch import IGNORE, PAD
from sleeptrain.data.tasks.gsm_infinite.solver import solve
from sleeptrain.data.tasks.gsm_infinite.task import GsmInfinite
from sleeptrain.data.tasks.gsm_infinite.wording import WORDINGS
from sleeptrain.data.tasks.task import Answered
from sleeptrain.data.tokenizer import train_tokenizer
from sleeptrain.errors import ConfigError
from tests.data.tasks.gsm_infinite.made import TOKENIZER, config, problems


def test_a_row_asks_first_and_answers_last() -> None:
    task = GsmInfinite(config())
    batch = task.rows(0, 0, 30)
    for row in range(30):
        tokens, targets = batch.tokens_BT[row], batch.targets_BT[row]
        prompt, _, answered = task.text(tokens.tolist()).partition(" Answer:")
        [wording] = [w for w in WORDINGS if prompt.startswith(w.question.split("{q}")[0])]
        question, context = re.fullmatch(r"(.+?[?.]) (.*)", prompt).groups()  # type: ignore[union-attr]
        answer, ops = solve(wording, question, context)
        predicted = targets[targets != IGNORE].tolist()
        assert task.text(predicted) == str(answer) and predicted[-1] == TOKENIZER.eos_id and 1 <= ops <= 3
        assert answered.strip() == str(answer), "the answer's tokens are inputs too, all but its end"
        length = int((batch.documents_BT[row] != PAD).sum())
        assert (targets != IGNORE).nonzero().flatten().tolist() == list(range(length - len(predicted), length))
        assert 150 <= length <= 220 and (batch.documents_BT[row, length:] == PAD).all()


def test_a_problem_without_operations_asks_for_a_number_in_its_text() -> None:
    task = GsmInfinite(config(min_ops=0, max_ops=1))
    counts = Counter(task._pool.held_out(number).ops for number in range(400))
    assert set(counts) == {0, 1} and min(counts.values()) > 150
    problem = next(p for p in map(task._pool.held_out, range(400)) if p.ops == 0)
    quantity = re.search("(the (?:number|count|stock) .+?)[?.]$", problem.question).group(1)  # type: ignore[union-attr]
    sentences = [s for s in problem.context.split(". ") if s.lower().startswith(quantity.lower())]
    assert len(sentences) == 1 and re.fullmatch(r".* (\d)\.?", sentences[0]).group(1) == str(problem.answer)  # type: ignore[union-attr]


def test_operations_are_uniform() -> None:
    task = GsmInfinite(config(max_ops=8, min_tokens=300, max_tokens=340))
    batch = task.held_out(0, 400)
    ops = []
    for row in range(400):
        prompt = task.text(batch.tokens_BT[row].tolist()).partition(" Answer:")[0]
        [wording] = [w for w in WORDINGS if prompt.startswith(w.question.split("{q}")[0])]
        ops.append(solve(wording, *re.fullmatch(r"(.+?[?.]) (.*)", prompt).groups())[1])  # type: ignore[union-attr]
    found = Counter(ops)
    assert set(found) == set(range(1, 9)) and min(found.values()) > 28
    right_BT = Answered(batch, batch.targets_BT.clone(), torch.zeros(batch.targets_BT.shape))
    by_ops = task.metrics([right_BT])["accuracy_by_ops"]
    assert by_ops == {f"ops={n}": 1.0 for n in range(1, 9)}, "a row's operations are known by its number"
    spoiled = Answered(batch, torch.where(torch.tensor(ops)[:, None] == 3, -1, batch.targets_BT), right_BT.loss_BT)
    assert {k for k, v in task.metrics([spoiled])["accuracy_by_ops"].items() if v == 0.0} == {"ops=3"}


def test_metrics_against_a_count_by_hand() -> None:
    """A row counts when all its tokens are right. Three of eight are wrong, one in its last token only."""
    task = GsmInfinite(config())
    batch = task.held_out(0, 8)
    predicted_BT = batch.targets_BT.clone()
    for row, place in ((0, 0), (3, -1), (5, 0)):
        at = int((batch.targets_BT[row] != IGNORE).nonzero()[place])
        predicted_BT[row, at] += 1
    parts = [Answered(batch.rows(a, b), predicted_BT[a:b], torch.zeros(b - a, 220)) for a, b in ((0, 5), (5, 8))]
    assert task.metrics(parts)["accuracy"] == 5 / 8


def test_paper_lengths_can_be_reached() -> None:
    batch = GsmInfinite(GsmInfiniteConfig()).rows(0, 0, 40)
    lengths = (batch.documents_BT != PAD).sum(1).tolist()
    assert batch.tokens_BT.shape == (40, 3300) and min(lengths) >= 2000 and max(lengths) <= 3300
    assert min(lengths) < 2200 and max(lengths) > 3100


def test_lengths_are_in_the_tokens_of_the_models_own_tokenizer(tmp_path: Path) -> None:
    texts = [p.prompt for p in problems(60)]
    tokenizer = train_tokenizer(texts, 400, tmp_path / "tokenizer.model")
    task = GsmInfinite(config(tokenizer=str(tmp_path), min_tokens=250, max_tokens=400))
    batch = task.rows(0, 0, 20)
    assert task.vocab_size == 400
    for row in range(20):
        inputs = batch.tokens_BT[row][batch.documents_BT[row] != PAD].tolist()
        predicted = batch.targets_BT[row][batch.targets_BT[row] != IGNORE].tolist()
        assert 240 <= len(inputs) <= 400 and predicted[-1] == tokenizer.eos_id
        assert re.fullmatch(r" \d{1,3}", tokenizer.decode(predicted))
        prompt = inputs[: len(inputs) - len(predicted) + 1]
        assert tokenizer.decode(prompt).endswith(" Answer:") and tokenizer.encode(tokenizer.decode(prompt)) == prompt


def test_there_is_room_for_the_longest_answer_of_a_tokenizer_that_merges_some(tmp_path: Path) -> None:
    texts = [*(p.prompt for p in problems(20)), *["Answer: 100 and Answer: 999."] * 99]
    tokenizer = train_tokenizer(texts, 400, tmp_path / "tokenizer.model")
    room = [len(tokenizer.encode(f" {answer}")) for answer in range(1000)]
    assert max(room[100], room[999]) < max(room), "the case is not the one to test"
    task = GsmInfinite(config(tokenizer=str(tmp_path), min_tokens=250, max_tokens=400))
    assert task._pool._lengths.answer == max(room)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_ops": 8}, ["max_tokens=220", "max_ops=8", "at least"]),
        ({"min_tokens": 210}, ["max_tokens=220", "min_tokens=210", "at least"]),
        ({"max_tokens": 9000}, ["max_tokens=9000", "at most", "names"]),
    ],
)
def test_impossible_lengths_are_refused(changes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        GsmInfinite(config(**changes))
    assert all(word in str(error.value) for word in words), error.value
    [way_out] = re.findall(r"must be at (?:least|most) (\d+)", str(error.value))
    GsmInfinite(config(**changes | {"max_tokens": int(way_out)})).rows(0, 0, 20)
