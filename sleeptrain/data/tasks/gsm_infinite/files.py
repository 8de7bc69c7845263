"""Problems from files in the format of the public generator: JSON lines with problem, question, solution, op, template.

github.com/Infini-AI-Lab/gsm_infinite writes it: the solution ends in "Answer: <number>.", `op` is the number of its
operations. The meaning of the sentences is not checked, because our solver does not know their wording.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleeptrain.data.tasks.gsm_infinite.problem import Problem
from sleeptrain.errors import DataError
from sleeptrain.plain_files import require_plain
from sleeptrain.small_files import parse_json

FINAL = re.compile(r"Answer:\s*([0-9]{1,18})\.?\s*$")
TEXTS = ("problem", "question", "solution", "template")


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file. Raises DataError, which names the line: unreadable, no problems, or another format."""
    require_plain(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"problems {path} cannot be read: {error}") from error
    problems = [_problem(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not problems:
        raise DataError(f"problems {path}: the file is empty")
    return problems


def _problem(where: str, line: bytes) -> Problem:
    try:
        record = parse_json(line.decode())
    except ValueError as error:
        raise DataError(f"{where} is no JSON in UTF-8: {error}") from error
    if not isinstance(record, Mapping) or not all(isinstance(record.get(name), str) for name in TEXTS):
        raise DataError(f"{where} must be an object with the texts {', '.join(TEXTS)}")
    if not (record["question"].strip() and record["problem"].strip()):
        raise DataError(f"{where}: the problem and the question must not be empty")
    return Problem(
        record["question"].strip(), record["problem"].strip(), _answer(where, record), _ops(where, record),
        record["template"],
    )  # fmt: skip


def _answer(where: str, record: Mapping[str, Any]) -> int:
    if match := FINAL.search(record["solution"]):
        return int(match[1])
    raise DataError(f"{where}: the solution must end in 'Answer: <number>.', not {record['solution'][-40:]!r}")


def _ops(where: str, record: Mapping[str, Any]) -> int:
    ops = record.get("op")
    if type(ops) is not int or ops < 0:
        raise DataError(f"{where}: op must be a number of operations, not {ops!r}")
    return ops
