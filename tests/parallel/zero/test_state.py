"""Checkpoints of a ZeRO engine: full tensors by name, whatever the layout that wrote them or reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.errors import DataError
from sleeptrain.parallel.zero.state import load
from tests.checkpoint.contents import InMemory, flat
from tests.parallel.processes import run_ranks
from tests.parallel.zero import cases
from tests.parallel.zero.test_engine import assert_equal

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.parametrize(("world", "zero"), [(4, 2), (2, 3), (2, 0), (1, 1)])
def test_a_checkpoint_goes_on_in_another_layout(world: int, zero: int) -> None:
    """Two steps on two ranks under ZeRO-1, then one in another layout, against three in one process."""
    saved = run_ranks(cases.data_parallel, 2, 1, cases.whole_rounds, cases.small_model, range(2))[0]
    state = {"model": saved["model"], "optim": saved["optim"]}

    def go_on() -> dict[str, Any]:
        return cases.data_parallel(zero, make=lambda: cases.small_model(9), steps=[2], saved=state)

    results, wanted = run_ranks(go_on, world), cases.single_process()
    for key in ("losses", "norms"):
        wanted[key] = wanted[key][2:]
    assert_equal(results, wanted)


def test_a_checkpoint_of_one_process_is_loaded_and_saved_again_exactly() -> None:
    done = cases.single_process(steps=2)
    state = {"model": done["model"], "optim": done["optim"]}
    state["model"]["norm.weight"][:] = -0.0

    def there_and_back() -> dict[str, Any] | None:
        engine = cases.engine_for(cases.small_model(9), 2)
        load(engine, InMemory(flat(state)))
        return cases.stage_state(engine)

    first, second = run_ranks(there_and_back, 2)
    assert second is None
    assert all(torch.equal(first["model"][n].view(torch.int32), t.view(torch.int32)) for n, t in state["model"].items())
    for kind, named in state["optim"].items():
        for name, tensors in named.items():
            assert all(torch.equal(first["optim"][kind][name][key], t) for key, t in tensors.items())


def test_parameters_of_one_zero_group_must_have_done_the_same_steps() -> None:
    state = cases.single_process(steps=1)
    state["optim"]["adamw"]["norm.weight"]["step"] += 1
    saved = InMemory(flat({"model": state["model"], "optim": state["optim"]}))

    def run() -> str:
        with pytest.raises(DataError) as caught:
            load(cases.engine_for(cases.small_model(9), 1), saved)
        return str(caught.value)

    assert all("have done [1.0, 2.0] steps" in message for message in run_ranks(run, 2))
