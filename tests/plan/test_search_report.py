"""The search's table and JSON object."""

from __future__ import annotations

from collections import Counter

from sleeptrain.config.compose import compose
from sleeptrain.plan.links import LINK_SHARES
from sleeptrain.plan.search import Found, Search
from sleeptrain.plan.search_report import search_to_json, search_to_text


def result() -> Search:
    config = compose(["experiment=stdlib", "parallel.tensor=2", "train.micro_batch=4", "sleep.recompute=block"])
    found = Found(config, ("block", "block"), 2**31, 12.5, 0.25, 0.7, 0.1, 0.15, False)
    return Search([found], Counter({"data.batch (n) must be even": 3}), too_large=5, slower=7, forecast=2)


def test_a_line_for_each_layout_with_settings_to_paste() -> None:
    text = search_to_text(result(), 8, "H100")
    pasted = "parallel.tensor=2 parallel.pipeline=1 parallel.zero=1 train.micro_batch=4 sleep.recompute=block"
    [line] = [line for line in text.splitlines() if pasted in line]
    assert line.split()[:7] == ["12.5", "25.0%", "2", "70%", "10%", "15%", "compute"]
    assert "2 layouts forecast, 7 cannot be among these, 5 need more than 90%" in text
    assert "     3  data.batch (n) must be even" in text
    assert f"links reach {LINK_SHARES.inside:.0%} of their rate" in text, "parameters are stated"


def test_json_has_the_same() -> None:
    found = search_to_json(result(), 8, "H100")
    [layout] = found["layouts"]
    assert layout["settings"][0] == "parallel.tensor=2" and layout["modes"] == ["block", "block"]
    assert (layout["hours"], layout["memory"], layout["limit"]) == (12.5, 2**31, "compute")
    assert found["refused"] == {"data.batch (n) must be even": 3} and found["processes"] == 8
