"""Problems from files in the public generator's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleeptrain.data.tasks.gsm_infinite.files import read_problems
from sleeptrain.errors import DataError
from tests.data.tasks.gsm_infinite.made import write

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
def test_the_answer_is_the_last_word_of_a_solution(tmp_path: Path, solution: str, answer: int) -> None:
    [problem] = read_problems(Path(write(tmp_path / "one.jsonl", [RECORD | {"solution": solution}])))
    assert (problem.answer, problem.ops, problem.wording) == (answer, 2, "t")
