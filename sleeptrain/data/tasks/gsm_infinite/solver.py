"""Solves a problem from its text alone. Every generated problem is checked by it."""

from __future__ import annotations

import re

from sleeptrain.data.tasks.gsm_infinite.graph import Equation, Quantity, num_operations
from sleeptrain.data.tasks.gsm_infinite.wording import Wording
from sleeptrain.errors import DataError


def solve(wording: Wording, question: str, context: str) -> tuple[int, int]:
    """(the answer, the number of operations that it takes).

    Raises DataError for a sentence that is not of the wording, a quantity that is defined twice or needed and never
    defined, and quantities that need each other.
    """
    equations: dict[Quantity, Equation] = {}
    for sentence in re.findall(r"[^.]+\.", context):
        equation = wording.read(sentence.strip())
        if equation.quantity in equations:
            raise DataError(f"{wording.named(equation.quantity)} is said twice")
        equations[equation.quantity] = equation
    query = wording.read_question(question)
    value = _value(wording, equations, query)
    return value, num_operations(list(equations.values()), query)


def _value(wording: Wording, equations: dict[Quantity, Equation], query: Quantity) -> int:
    values: dict[Quantity, int] = {}
    path = [query]
    while path:
        quantity = path[-1]
        if quantity not in equations:
            raise DataError(f"{wording.named(quantity)} is needed and never said")
        equation = equations[quantity]
        missing = [q for q in equation.operands if q not in values]
        if not missing:
            values[quantity] = equation.value([values[q] for q in equation.operands])
            path.pop()
        elif missing[0] in path:
            raise DataError(f"{wording.named(missing[0])} is needed to find itself")
        else:
            path.append(missing[0])
    return values[query]
