"""Checkpoints of a ZeRO engine: full tensors by name, whatever the layout that wrote them or reads them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain.config.compose import compose
from sleeptrain.errors import DataError, DivergedError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim.optimizers import STATE
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.parallel.zero.matrix_exchange import Fragment
from sleeptrain.parallel.zero.partitions import region
from sleeptrain.parallel.zero.state import fragment_place, load, local_tensors
from tests.checkpoint.contents import InMemory, flat
from tests.parallel.processes import run_ranks
from tests.parallel.zero import cases
from tests.parallel.zero.test_engine import assert_equal

pytestmark = pytest.mark.usefixtures("imported")


@pytest.fixture(scope="module")
def after_two_steps(imported: None) -> dict[str, Any]:
    """The state of two ranks under ZeRO-1."""
    saved = run_ranks(cases.data_parallel, 2, 1, cases.whole_rounds, cases.small_model, range(2))[0]
    return {"model": saved["model"], "optim": saved["optim"]}


@pytest.mark.parametrize(("world", "zero"), [(4, 2), (2, 3), pytest.param(2, 0, marks=pytest.mark.slow), (1, 1)])
def test_a_checkpoint_goes_on_in_another_layout(world: int, zero: int, after_two_steps: dict[str, Any]) -> None:
    """Two steps on two ranks under ZeRO-1, then one in another layout, against three in one process."""
    state = after_two_steps

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


def flat_windows(sizes: dict[str, int], ranks: int) -> list[list[Fragment]]:
    """The fragments of each data rank where ZeRO-1 cuts a group, laid end to end, into equal parts."""
    width = -(-sum(sizes.values()) // ranks)
    found: list[list[Fragment]] = [[] for _ in range(ranks)]
    before = 0
    for name, size in sizes.items():
        for rank in range(before // width, (before + size - 1) // width + 1):
            start, stop = max(before, rank * width), min(before + size, (rank + 1) * width)
            found[rank].append(Fragment(name, start - before, stop - start, start - rank * width))
        before += size
    return found


@pytest.mark.parametrize("experiment", ["pretrain_2b_1024", "pretrain_2b"])
def test_a_2b_model_is_written_evenly_by_1024_ranks(experiment: str) -> None:
    """256 replicas of four tensor ranks, or 1,024 replicas: counted, without processes."""
    config = compose([f"experiment={experiment}"])
    tensor = config.parallel.tensor
    sharding = ModelSharding(config.model, tensor)
    with torch.device("meta"):
        model = Hybrid(config.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    written: dict[tuple[int, int], int] = Counter()
    for kind in STATE:
        names = [name for name, role in parameter_roles(model).items() if role.kind == kind]
        local = {name: sharding.take(name, torch.empty(shapes[name], device="meta"), 0).numel() for name in names}
        per_element = 4 * (1 + len(STATE[kind] - {"step"}))
        for data, fragments in enumerate(flat_windows(local, 1024 // tensor)):
            for f, rank in itertools.product(fragments, range(tensor)):
                part = sharding.part(f.name, shapes[f.name], rank)
                copies = (rank, tensor) if sharding[f.name].dim is None else (0, 1)
                written[data, rank] += per_element * fragment_place(part, f).share(*copies).numel
    roles = parameter_roles(model)
    assert sum(written.values()) == sum(
        4 * (1 + len(STATE[roles[name].kind] - {"step"})) * math.prod(shape) for name, shape in shapes.items()
    )
    assert len(written) == 1024 and max(written.values()) <= 1.05 * sum(written.values()) / 1024


@pytest.mark.parametrize(("tensor", "holders"), [(2, "tensor ranks"), (1, "replicas")])
def test_processes_that_differ_in_what_they_all_hold_are_found(tensor: int, holders: str) -> None:
    def run() -> str:
        engine = cases.engine_for(cases.small_model(), 1, tensor=tensor, shard=1)
        local_tensors(engine)
        if dist.get_rank():
            partition, fragment = next(
                (p, f) for p in engine.optimizer.partitions for f in p.fragments if f.name == "norm.weight"
            )
            with torch.no_grad():
                region(partition.tensors, fragment)[0] += 1
        with pytest.raises(DivergedError) as caught:
            local_tensors(engine)
        return str(caught.value)

    assert all(f"{holders} hold different values of norm.weight" in message for message in run_ranks(run, 2))
