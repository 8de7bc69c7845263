"""Problems from files in the public generator's format."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.config.schema import GsmInfiniteConfig
from sleeptrain.data.batch import IGNORE
from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.files import read_problems
from sleeptrain.data.tasks.gsm_infinite.problem import Lengths, draw_core, make_problem
from sleeptrain.data.tasks.gsm_infinite.task import GsmInfinite
from sleeptrain.data.tasks.gsm_infinite.words import WordTokenizer
from sleeptrain.errors import DataError

TOKENIZER = WordTokenizer()


def records(first: int, count: int) -> list[dict[str, Any]]:
    """As the public generator writes them, in words that our vocabulary has."""
    made = []
    for number in range(first, first + count):
        draws = Draws(0, 0, number)
        lengths = Lengths(150, 203, 3, lambda text: len(TOKENIZER.encode(text)))
        problem = make_problem(draws, draw_core(draws, 1 + number % 3, held_out=False), lengths)
        made.append(
            {
                "problem": problem.context,
                "question": problem.question,
                "solution": f"Define hens as p; so p = {problem.answer}. Answer: {problem.answer}.",
                "op": problem.ops,
                "id": str(number),
                "template": "crazy_zootopia",
                "mode": "normalforward",
                "length": "zero_context",
                "d": 3,
            }
        )
    return made


def write(path: Path, found: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> GsmInfiniteConfig:
    train, validation = (write(tmp_path / n, r) for n, r in (("t.jsonl", records(0, 12)), ("v.jsonl", records(50, 6))))
    return GsmInfiniteConfig(
        max_ops=3, min_tokens=100, max_tokens=220, train=train, validation=validation, validation_samples=5
    )


def test_rows_are_the_files_problems_in_a_new_order_each_epoch(config: GsmInfiniteConfig) -> None:
    task = GsmInfinite(config)
    given = {f"{r['question']} {r['problem']} Answer:": r["solution"].split()[-1][:-1] for r in records(0, 12)}
    orders = []
    for epoch in range(3):
        batch = task.rows(7, 12 * epoch, 12)
        prompts = []
        for tokens, targets in zip(batch.tokens_BT, batch.targets_BT, strict=True):
            prompt = task.text(tokens.tolist()).partition("Answer:")[0] + "Answer:"
            assert task.text(targets[targets != IGNORE].tolist()) == given[prompt]
            prompts.append(prompt)
        assert Counter(prompts) == Counter(list(given)), "every problem once an epoch"
        orders.append(prompts)
    assert orders[0] != orders[1] != orders[2]
    assert [task.text(t.tolist()) for t in task.rows(8, 0, 12).tokens_BT] != [
        task.text(t.tolist()) for t in task.rows(7, 0, 12).tokens_BT
    ]
    assert task.num_held_out == 5 and len(task.held_out(0, 5).tokens_BT) == 5
    assert task.report() == {"problems": 12, "left_out": 0}
    assert task.guessing()["commonest"] == pytest.approx(Counter(given.values()).most_common(1)[0][1] / 12, abs=0.05)


def test_problems_of_other_lengths_and_operations_are_left_out_and_counted(config: GsmInfiniteConfig) -> None:
    config.max_ops = 2
    task = GsmInfinite(config)
    assert task.report() == {"problems": 8, "left_out": 4 + 2}
    config.max_tokens = 120
    with pytest.raises(DataError, match=r"t\.jsonl: of 12, 8 have 1 to 2 operations and none of these 100 to 120"):
        GsmInfinite(config)


def test_a_problem_in_both_files_is_refused(config: GsmInfiniteConfig) -> None:
    write(Path(config.validation), [*records(50, 2), *records(3, 1)])
    with pytest.raises(DataError, match=r"1 problems of .*v\.jsonl are in .*t\.jsonl too"):
        GsmInfinite(config)


def test_a_problem_in_both_files_is_found_however_it_is_written(config: GsmInfiniteConfig) -> None:
    [record] = records(3, 1)
    turned = " ".join(reversed([f"{sentence}." for sentence in record["problem"].rstrip(".").split(". ")]))
    write(Path(config.validation), [*records(50, 2), record | {"problem": turned.replace(" ", "\u00a0")}])
    with pytest.raises(DataError, match=r"1 problems of .*v\.jsonl are in .*t\.jsonl too"):
        GsmInfinite(config)


def test_held_out_problems_that_are_sorted_are_judged_in_another_order(config: GsmInfiniteConfig) -> None:
    by_ops = sorted(records(50, 60), key=lambda record: record["op"])
    write(Path(config.validation), by_ops)
    config.validation_samples = 15
    task = GsmInfinite(config)
    assert set(Counter(task._pool.held_out_ops(n) for n in range(15))) == {1, 2, 3}
    batch = task.held_out(0, 15)
    for row in range(15):
        problem = task._pool.held_out(row)
        assert task.text(batch.tokens_BT[row].tolist()).startswith(problem.prompt)
        assert problem.ops == task._pool.held_out_ops(row)


def test_the_position_belongs_to_the_problems(config: GsmInfiniteConfig) -> None:
    before = GsmInfinite(config).identity()
    write(Path(config.train), records(1, 12))
    assert GsmInfinite(config).identity() != before


RECORD = {"problem": "p", "question": "q", "solution": "x = 1. Answer: 1.", "op": 2, "template": "t"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        (json.dumps(RECORD | {"solution": f"Answer: {'9' * 5000}."}), "line 2: the solution must end in"),
        (json.dumps(RECORD | {"solution": "Answer: ٣."}), "line 2: the solution must end in"),
        (json.dumps(RECORD | {"problem": " "}), "line 2: the problem and the question must not be empty"),
        (json.dumps([1]), "line 2 must be an object"),
        (json.dumps(RECORD | {"question": None}), "line 2 must be an object with the texts problem, question"),
        (json.dumps(RECORD | {"solution": "x = 1."}), "line 2: the solution must end in 'Answer: <number>.'"),
        (json.dumps(RECORD | {"op": "2"}), "line 2: op must be a number of operations, not '2'"),
    ],
)
def test_damaged_files_are_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{json.dumps(RECORD)}\n{line}\n")
    with pytest.raises(DataError) as error:
        read_problems(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_lines_end_where_json_lines_do_and_are_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(json.dumps(RECORD | {"problem": "p\u2028 \u0085p"}, ensure_ascii=False).encode() + b"\r\n")
    assert read_problems(path)[0].context == "p\u2028 \u0085p"
    path.write_bytes(json.dumps(RECORD).encode() + b'\n{"problem": "\xff"}\n')
    with pytest.raises(DataError, match=r"problems\.jsonl, line 2 is no JSON in UTF-8"):
        read_problems(path)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read"):
        read_problems(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_problems(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("solution", "answer"), [("Answer: 12.", 12), ("so a = 3. Answer: 0", 0), ("Answer: 1. Answer: 2.", 2)]
)
def test_the_answer_is_the_last_thing_said(tmp_path: Path, solution: str, answer: int) -> None:
    [problem] = read_problems(Path(write(tmp_path / "one.jsonl", [RECORD | {"solution": solution}])))
    assert (problem.answer, problem.ops, problem.wording) == (answer, 2, "t")
