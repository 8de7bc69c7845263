"""The picture of a simulation."""

from __future__ import annotations

import pytest

from sleeptrain.parallel.pipeline.plot import HATCHES, plot_schedule
from sleeptrain.parallel.pipeline.schedule import Backward, schedule
from sleeptrain.parallel.pipeline.simulate import simulate
from tests.parallel.pipeline.cases import even_stages, plan


def test_every_task_is_drawn_on_its_rank_in_its_colours(tmp_path):
    simulation = simulate(schedule([plan(2, 3)] * 4, even_stages(3)))
    figure = plot_schedule(simulation)
    (axes,) = figure.axes
    bars = [(group, box.get_extents()) for group in axes.collections for box in group.get_paths()]
    assert len(bars) == len(simulation.spans)
    for rank in range(3):
        on_rank = [box.width for _, box in bars if round(box.y0 + 0.4) == rank]
        assert sum(on_rank) == pytest.approx(simulation.busy[rank])
    backward_time = sum(box.width for group, box in bars if group.get_hatch() == HATCHES[Backward])
    assert backward_time == pytest.approx(sum(simulation.busy) * 3 / 4)
    colours = {tuple(group.get_facecolor()[0]) for group in axes.collections}
    assert len(colours) == 4  # three passes of a window that sleeps, one of the last window
    figure.savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 1000


def test_an_empty_step_is_drawn():
    assert plot_schedule(simulate(schedule([], even_stages(2)))).axes
