"""A problem is solved from its text alone."""

from __future__ import annotations

import re

import pytest
import sympy

from sleeptrain.data.tasks.gsm_infinite.problem import Problem
from sleeptrain.data.tasks.gsm_infinite.solver import solve
from sleeptrain.data.tasks.gsm_infinite.wording import FARM
from sleeptrain.errors import DataError
from tests.data.tasks.gsm_infinite.made import problems

NAME = r"(?:number|count|stock) of \w+ (?:at|kept in|on dock) \w+"


# Each turn as an expression that equals 0, without the package. x0: its quantity; x1, x2: the operands.
SYMBOLIC = {
    r"x0 is (\d+)|x0 equals (\d+)|x0 comes to (\d+)": "x0 - n",
    r"x0 is the sum of x1 and x2|x0 equals x1 plus x2|x0 comes to x1 together with x2": "x0 - x1 - x2",
    r"x0 is x1 minus x2|x0 equals the difference of x1 and x2|x0 comes to x1 less x2": "x0 - x1 + x2",
    r"x0 is (\d+) more than x1|x0 exceeds x1 by (\d+)|x0 comes to x1 and (\d+) besides": "x0 - x1 - n",
    r"x0 is (\d+) fewer than x1|x0 falls short of x1 by (\d+)|x0 comes to x1 without (\d+) of them": "x0 - x1 + n",
    r"x0 is (\d+) times x1|x0 equals x1 multiplied by (\d+)|x0 comes to (\d+) for each one in x1": "x0 - n*x1",
}


def equations(problem: Problem) -> dict[str, tuple[str, list[str]]]:
    """{quantity: (an expression that equals 0, the names in it)}."""
    found = {}
    for sentence in problem.context.rstrip(".").split(". "):
        names = re.findall(NAME, sentence)
        short = re.sub("(?:[Tt]he )" + NAME, "x?", sentence)
        for place in range(len(names)):
            short = short.replace("x?", f"x{place}", 1)
        [(turn, zero)] = [(t, z) for t, z in SYMBOLIC.items() if re.fullmatch(t, short)]
        number = next((g for g in re.fullmatch(turn, short).groups() if g), "0")  # type: ignore[union-attr]
        assert names[0] not in found
        found[names[0]] = (zero.replace("n", number), names)
    return found


def test_answers_equal_a_symbolic_evaluation() -> None:
    """sympy solves all sentences as one system of linear equations. The test counts the equations that are needed."""
    for problem in problems(24):
        equation_of = equations(problem)
        symbols = {name: sympy.Symbol(f"q{index}") for index, name in enumerate(equation_of)}
        system = [
            sympy.sympify(zero, locals={f"x{i}": symbols[name] for i, name in enumerate(names)})
            for zero, names in equation_of.values()
        ]
        [target] = re.findall(NAME, problem.question)
        [solution] = sympy.linsolve(system, *symbols.values())
        assert solution[list(symbols).index(target)] == problem.answer
        needed, waiting = set[str](), [target]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += equation_of[name][1][1:]
        assert sum(len(equation_of[name][1]) > 1 for name in needed) == problem.ops
        assert all(0 <= value <= 999 for value in solution)
        assert len(needed) < len(equation_of), "there are distractors"


def test_the_solver_refuses_what_it_cannot_solve() -> None:
    def refusal(question: str, context: str) -> str:
        with pytest.raises(DataError) as error:
            solve(FARM, question, context)
        return str(error.value)

    question, one = (
        "What is the number of hens at Ashby?",
        "The number of hens at Ashby is 2 more than the number of cows at Oakham.",
    )
    cows = "The number of cows at Oakham is 3."
    assert solve(FARM, question, f"{cows} {one}") == (5, 1)
    assert "needed and never said" in refusal(question, one)
    assert "said twice" in refusal(question, f"{one} {cows} {cows}")
    around = "The number of cows at Oakham is 2 times the number of hens at Ashby."
    assert "needed to find itself" in refusal(question, f"{one} {around}")
    assert "no sentence" in refusal(question, "Cows are many.")
    assert "no question" in refusal("How many hens?", one)
