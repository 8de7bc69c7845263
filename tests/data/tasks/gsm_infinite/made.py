"""Problems that several tests make, and files of them in the public generator's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleeptrain.config.schema import GsmInfiniteConfig
from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.problem import Lengths, Problem, draw_core, make_problem
from sleeptrain.data.tasks.gsm_infinite.words import WordTokenizer

TOKENIZER = WordTokenizer()


LENGTHS = Lengths(300, 403, 3, lambda text: len(TOKENIZER.encode(text)))


def problems(count: int, lengths: Lengths = LENGTHS, held_out: bool = False) -> list[Problem]:
    found = []
    for number in range(count):
        draws = Draws(0, 0, number)
        found.append(make_problem(draws, draw_core(draws, 1 + number % 8, held_out), lengths))
    return found


def config(**changes: object) -> GsmInfiniteConfig:
    return GsmInfiniteConfig(**({"max_ops": 3, "min_tokens": 150, "max_tokens": 220} | changes))  # type: ignore[arg-type]


def records(first: int, count: int) -> list[dict[str, Any]]:
    """Records as the public generator writes them, in words of our vocabulary."""
    result = []
    for number in range(first, first + count):
        draws = Draws(0, 0, number)
        lengths = Lengths(150, 203, 3, lambda text: len(TOKENIZER.encode(text)))
        problem = make_problem(draws, draw_core(draws, 1 + number % 3, held_out=False), lengths)
        result.append(
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
    return result


def write(path: Path, found: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return str(path)
