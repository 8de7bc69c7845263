"""The time of a task, in the unit that schedules are compared in."""

from __future__ import annotations

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.task_costs import Costs
from tests.parallel.pipeline.cases import plan
from tests.parallel.pipeline.test_stages import PARTIAL


@pytest.mark.parametrize("times", [dict(forward=0), dict(backward=-1), dict(head=-1), dict(message=-0.1)])
def test_impossible_times_are_refused(times):
    with pytest.raises(ConfigError):
        Costs(**times)


def test_costs_count_layers_tokens_and_the_head_where_there_is_a_loss():
    wake, sleep = plan(2, 2)[:2]
    costs = Costs(forward=1, backward=3, head=5)
    assert [costs.time(wake, PARTIAL, s, backward=False) for s in range(4)] == [8, 8, 8, 28]
    assert [costs.time(sleep, PARTIAL, s, backward=True) for s in range(4)] == [12, 24, 24, 12]
