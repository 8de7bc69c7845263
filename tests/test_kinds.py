"""Kinds of values from a file."""

from __future__ import annotations

from typing import Any

import pytest

from sleeptrain import kinds
from sleeptrain.kinds import Check

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (kinds.is_count, [0, 1, 2**62], [-1, 2**62 + 1, 10**400, True, 1.0, "1", None, NAN, []]),
        (kinds.is_positive, [1, 2**62], [0, -1, True, 1.0, "1", None]),
        (kinds.is_number, [0, -1, 1.5, NAN, INF, -(2**62)], [2**63, -(2**63), 10**400, True, "1", None, []]),
        (kinds.is_time, [0, 0.5, 1e11], [-1, 1e12, NAN, INF, True, "1", None]),
        (kinds.is_bool, [True, False], [0, 1, "true", None]),
        (kinds.is_text, ["", "a"], [0, None, b"a", ["a"]]),
        (kinds.or_none(kinds.is_text), [None, ""], [0, False, []]),
        (kinds.is_flops, [0, 2**63, 10**36], [-1, 10**36 + 1, True, 1e30, "1", None]),
        (kinds.list_of(kinds.is_count), [[], [1, 2]], [[1, None], (1,), {}, "12", None]),
        (kinds.dict_of(kinds.is_count), [{}, {"a": 1}], [{"a": -1}, [], None, [1]]),
        (kinds.has({"a": kinds.is_count}), [{"a": 1}, {"a": 1, "b": None}], [{}, {"a": None}, {"b": 1}, None, ["a"]]),
        (kinds.exactly({"a": kinds.is_count}), [{"a": 1}], [{"a": 1, "b": 1}, {}, {"a": -1}, None]),
    ],
)
def test_kinds(check: Check, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not check(value)] == []
    assert [value for value in wrong if check(value)] == []
