"""A plan as text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sleeptrain.plan.report import gib, mb, short, table, to_json, to_text, worst_total
from tests.plan.planned import planned, text


def test_tables_name_units_and_assumptions():
    config = text("parallel.pipeline=2", "sleep.passes=2")
    said = to_text(planned(config, 4, "H200"))
    for part in ("warning   a step has 1 micro-batch", "GiB", "tokens/s/GPU", "MFU", "assumed:", "GPU-hours", "MB"):
        assert part in said
    assert "no forecast of time" in to_text(planned(text()))


def test_numbers_are_short() -> None:
    assert [short(n) for n in (0, 999, 1000, 12_345, 2.5e6, 1e24)] == ["0", "999", "1k", "12.3k", "2.5M", "1Y"]
    assert (gib(3 * 2**29), mb(1_234_567)) == ("1.5", "1.2")


def test_columns_are_aligned_and_words_in_the_last_column_to_the_left() -> None:
    assert table(["a", "long"], [[100, 2]]) == ["    a  long", "  100     2"]
    assert table(["a", "what"], [[1, "x"]]) == ["  a  what", "  1  x"]


def test_values_for_programs_are_those_of_the_plan() -> None:
    plan = planned(text("parallel.pipeline=2", "sleep.passes=2"), 4)
    values = to_json(plan)
    assert values == json.loads(json.dumps(values)) and values["layout"]["replicas"] == 2
    assert values["parameters"]["total"] == plan.parameters
    assert values["flops"] == sum(s["flops"] * s["steps"] for s in values["stages"])
    assert values["gpu"] is values["seconds"] is values["stages"][0]["speed"] is None
    assert worst_total(plan) == max(m["total"] for s in values["stages"] for m in s["memory"])


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "fits"), (0.95, "is tight"), (1.5, "does not fit")])
def test_a_gpu_that_is_too_small_is_reported(share: float, verdict: str) -> None:
    plan = planned(text(), gpu="H200")
    assert plan.gpu is not None
    name, gpu = plan.gpu
    plan = replace(plan, gpu=(name, replace(gpu, memory=worst_total(plan) / share)))
    assert f"takes {share:.0%}: {verdict}" in to_text(plan)
