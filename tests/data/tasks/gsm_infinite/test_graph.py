"""The arithmetic of a problem: values stay in bounds, and the answer takes the required operations."""

from __future__ import annotations

import pytest

from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.graph import Equation, Graph, Kind, num_operations

NAMES = [(item, place) for item in range(30) for place in range(30)]


@pytest.mark.parametrize(
    ("kind", "number", "operands", "value"),
    [
        (Kind.NUMBER, 4, (), 4),
        (Kind.SUM, 0, (7, 2), 9),
        (Kind.DIFFERENCE, 0, (7, 2), 5),
        (Kind.MORE, 3, (7,), 10),
        (Kind.FEWER, 3, (7,), 4),
        (Kind.TIMES, 3, (7,), 21),
    ],
)
def test_values_of_equations(kind: Kind, number: int, operands: tuple[int, ...], value: int) -> None:
    equation = Equation((0, 0), kind, number)
    assert equation.value(operands) == value and equation.is_operation == (kind is not Kind.NUMBER)


@pytest.mark.parametrize("ops", [0, 1, 2, 7, 40])
def test_a_quantity_takes_the_required_operations(ops: int) -> None:
    for seed in range(20):
        graph = Graph(Draws(seed, 0, 0), NAMES)
        query = graph.add_needed(ops)
        assert num_operations(graph.equations, query) == ops
        assert sum(equation.is_operation for equation in graph.equations) == ops, "and no other is there"


def test_values_are_within_bounds_and_each_quantity_is_defined_once_before_its_use() -> None:
    graph = Graph(Draws(0, 0, 0), NAMES)
    query = graph.add_needed(3)
    for _ in range(500):
        graph.add_distractor()
    values: dict[tuple[int, int], int] = {}
    for equation in graph.equations:
        assert equation.quantity not in values
        values[equation.quantity] = equation.value([values[operand] for operand in equation.operands])
    assert values == graph.values and min(values.values()) >= 0 and max(values.values()) <= 999
    assert num_operations(graph.equations, query) == 3, "distractors are not needed"
    assert {equation.kind for equation in graph.equations} == set(Kind)


def test_an_operation_that_two_operands_share_counts_once() -> None:
    a, b, c = NAMES[:3]
    equations = [Equation(a, Kind.NUMBER, 2), Equation(b, Kind.TIMES, 2, (a,)), Equation(c, Kind.SUM, 0, (b, b))]
    assert num_operations(equations, c) == 2 and num_operations(equations, a) == 0
