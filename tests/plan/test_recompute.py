"""`sleep.recompute=auto`: the first mode that fits."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import Config
from sleeptrain.plan import layout
from sleeptrain.plan.recompute import SHARE, Choice, choose_stages, modes_in_order
from sleeptrain.plan.report import to_json, to_text
from tests.plan.planned import planned, text

LONG = ("sleep.passes=4", "train.micro_batch=4", "data.batch=4")


def total(mode: str, *more: str, processes: int = 1) -> int:
    """Bytes of the fullest process."""
    [step] = planned(text(*LONG, f"sleep.recompute={mode}", *more), processes).steps
    return max(m.total for m in step.memory)


def chosen(config: Config, memory: float) -> Choice:
    [(first, choice)] = choose_stages(config, 1, memory, kernels=False)
    assert first == 0
    return choice


def test_the_first_mode_that_fits_is_chosen() -> None:
    config = text(*LONG, "sleep.recompute=auto")
    modes = modes_in_order(config)
    sizes = [total(mode) for mode in modes]
    assert modes == ("none", "selective", "pass", "window") and sizes == sorted(sizes, reverse=True)
    for mode, size in zip(modes, sizes, strict=True):
        assert chosen(config, (size + 1) / SHARE) == Choice(mode, size, True)
    assert chosen(config, sizes[-1]) == Choice("window", sizes[-1], False), "nothing fits"


def test_another_value_is_taken_as_it_is() -> None:
    assert chosen(text(*LONG, "sleep.recompute=block"), 0) == Choice("block")


def test_layouts_have_the_modes_that_they_allow() -> None:
    assert modes_in_order(text("parallel.pipeline=2")) == ("none", "selective", "block")
    assert modes_in_order(text("parallel.zero=3")) == ("none", "pass", "window")
    pipeline = ("parallel.pipeline=2", "train.micro_batch=1")
    sizes = [total(mode, *pipeline, processes=2) for mode in ("none", "selective", "block")]
    assert sizes == sorted(sizes, reverse=True)


def test_each_stage_of_the_curriculum_has_its_mode() -> None:
    config = text(*LONG[1:], "sleep.recompute=auto", "sleep.passes=1", "sleep.curriculum=[{tokens: 8192, passes: 8}]")
    [(_, one), (_, eight)] = choose_stages(config, 1, 10**15, kernels=False)
    assert one.mode == eight.mode == "none" and one.total < eight.total
    modes = [(first, c.mode) for first, c in choose_stages(config, 1, one.total / SHARE, kernels=False)]
    assert modes[0] == (0, "none") and modes[1][0] == 8192 and modes[1][1] != "none"


def test_a_plan_names_the_modes_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = text(*LONG, "sleep.recompute=auto")
    on_gpu = planned(config, gpu="4090")
    assert "sleep.recompute=auto chose the mode within 90% of 22.4 GiB of 4090" in to_text(on_gpu)
    assert to_json(on_gpu)["recompute"] == {"setting": "auto", "memory": 24e9}
    monkeypatch.setattr(layout, "device_memory", lambda _: (total("selective") + 1) / SHARE)
    here = planned(config)
    assert "assumed from this machine: name a GPU" in to_text(here)
    assert [stage["recompute"] for stage in to_json(here)["stages"]] == ["selective"]
    assert here.steps[0].memory == planned(text(*LONG, "sleep.recompute=selective")).steps[0].memory
    assert to_json(planned(text()))["recompute"] == {"setting": "none", "memory": None}
