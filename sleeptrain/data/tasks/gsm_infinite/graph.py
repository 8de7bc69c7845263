"""The arithmetic of a problem: each quantity is a number or one operation on others. The answer needs some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sleeptrain.data.tasks.draws import Draws

MAX_NUMBER = 5  # numbers in sentences are 1 to MAX_NUMBER
MAX_VALUE = 999  # largest value of any quantity, so that an answer has at most three digits

# (item, place): indices into the names of a wording.
Quantity = tuple[int, int]


class Kind(StrEnum):
    NUMBER = "number"  # n
    SUM = "sum"  # a + b
    DIFFERENCE = "difference"  # a - b
    MORE = "more"  # a + n
    FEWER = "fewer"  # a - n
    TIMES = "times"  # n * a


OF_ONE, OF_TWO = (Kind.MORE, Kind.FEWER, Kind.TIMES), (Kind.SUM, Kind.DIFFERENCE)


@dataclass(frozen=True)
class Equation:
    """The definition of a quantity. number: 0 for kinds without one. operands: quantities of other equations."""

    quantity: Quantity
    kind: Kind
    number: int = 0
    operands: tuple[Quantity, ...] = ()

    @property
    def is_operation(self) -> bool:
        return self.kind is not Kind.NUMBER

    def value(self, operands: Sequence[int]) -> int:
        """The value of the quantity. operands: the values of its operands."""
        match self.kind:
            case Kind.NUMBER:
                return self.number
            case Kind.SUM:
                return operands[0] + operands[1]
            case Kind.DIFFERENCE:
                return operands[0] - operands[1]
            case Kind.MORE:
                return operands[0] + self.number
            case Kind.FEWER:
                return operands[0] - self.number
            case Kind.TIMES:
                return operands[0] * self.number


class Graph:
    """Equations that are added one by one, and the values of their quantities.

    draws: the source of random choices. names: possible quantities; there must be more of them than equations.
    """

    def __init__(self, draws: Draws, names: Sequence[Quantity]) -> None:
        self._draws = draws
        self._names = names
        self.equations: list[Equation] = []
        self.values: dict[Quantity, int] = {}

    def add_needed(self, ops: int) -> Quantity:
        """Add a quantity that takes exactly `ops` operations to compute, and all quantities that it needs."""
        if ops == 0:
            return self._add(Kind.NUMBER, self._draws.between(1, MAX_NUMBER), ())
        if self._draws.below(2):
            return self._operate(OF_ONE, (self.add_needed(ops - 1),))
        left_ops = self._draws.below(ops)
        left = self.add_needed(left_ops)
        return self._operate(OF_TWO, (left, self.add_needed(ops - 1 - left_ops)))

    def add_distractor(self) -> None:
        """Add a quantity that the answer does not need: a number, or an operation on existing quantities."""
        kind = self._draws.below(3)
        if kind == 0 or len(self.equations) < 2:
            self._add(Kind.NUMBER, self._draws.between(1, MAX_NUMBER), ())
            return
        first, second = self._draws.below(len(self.equations)), self._draws.below(len(self.equations) - 1)
        operands = [self.equations[i].quantity for i in (first, second + (second >= first))]
        self._operate(OF_ONE if kind == 1 else OF_TWO, tuple(operands[:kind]))

    def _operate(self, kinds: Sequence[Kind], operands: tuple[Quantity, ...]) -> Quantity:
        """Add one operation on these operands, of a kind that keeps the value within [0, MAX_VALUE]."""
        kind, number = self._draws.choice(kinds), self._draws.between(1, MAX_NUMBER)
        values = [self.values[q] for q in operands]
        if kind is Kind.TIMES:
            number = max(number, 2)
        if kind is Kind.SUM and sum(values) > MAX_VALUE:
            kind = Kind.DIFFERENCE
        if kind is Kind.DIFFERENCE and values[0] < values[1]:
            operands = operands[::-1]
        if kind is Kind.FEWER and values[0] < number:
            kind = Kind.MORE
        if kind in (Kind.MORE, Kind.TIMES) and Equation((0, 0), kind, number).value(values) > MAX_VALUE:
            kind = Kind.FEWER
        return self._add(kind, 0 if kind in OF_TWO else number, operands)

    def _add(self, kind: Kind, number: int, operands: tuple[Quantity, ...]) -> Quantity:
        name = self._draws.choice(self._names)
        while name in self.values:
            name = self._draws.choice(self._names)
        equation = Equation(name, kind, number, operands)
        self.equations.append(equation)
        self.values[equation.quantity] = equation.value([self.values[q] for q in operands])
        return equation.quantity


def num_operations(equations: Sequence[Equation], query: Quantity) -> int:
    """The number of operations that computing `query` takes, each counted once."""
    by_quantity = {equation.quantity: equation for equation in equations}
    needed, stack = set[Quantity](), [query]
    while stack:
        quantity = stack.pop()
        if quantity not in needed:
            needed.add(quantity)
            stack += by_quantity[quantity].operands
    return sum(by_quantity[quantity].is_operation for quantity in needed)
