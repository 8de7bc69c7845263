"""Which elements a partition holds and where, and the layouts that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sleeptrain.optim.optimizers import ParameterRole
from sleeptrain.parallel.zero.flat_optimizer import FlatOptimizer
from sleeptrain.parallel.zero.matrix_exchange import Fragment, LayoutError
from sleeptrain.parallel.zero.partitions import (
    group_partitions,
    local_shape,
    own_part,
    region,
    require,
    whole_partitions,
)
from tests.parallel.zero.cases import OPTIM

pytestmark = pytest.mark.usefixtures("imported")


def test_an_unknown_layout_names_the_version() -> None:
    require(True, "all is well")
    with pytest.raises(LayoutError, match=rf"deepspeed {load_version()} .*not true that pigs fly"):
        require(False, "pigs fly")


def load_version() -> str:
    import deepspeed

    return deepspeed.__version__


def optimizer() -> tuple[FlatOptimizer, dict[str, torch.nn.Parameter]]:
    shapes = {"matrix": (2, 3), "bias": (4,), "other": (3, 2)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    roles = {name: ParameterRole("adamw" if name == "bias" else "muon") for name in shapes}
    return FlatOptimizer(roles, parameters, OPTIM), parameters


def test_without_cutting_each_parameter_is_one_fragment_after_the_one_before() -> None:
    flat, parameters = optimizer()
    muon, adamw = whole_partitions(flat, parameters)
    assert (muon.kind, muon.names) == ("muon", ("matrix", "other"))
    assert muon.fragments == (Fragment("matrix", 0, 6, 0), Fragment("other", 0, 6, 6))
    assert muon.tensors[0] is parameters["matrix"] and muon.tensors[1] is parameters["other"]
    assert (adamw.kind, adamw.fragments) == ("adamw", (Fragment("bias", 0, 4, 0),))


def test_a_region_is_a_view_of_the_tensor_that_holds_it() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(4)]
    region(tensors, Fragment("a", 0, 2, 4)).fill_(1)
    region(tensors, Fragment("b", 0, 3, 6)).fill_(2)
    assert tensors[0].tolist() == [[0, 0, 0], [0, 1, 1]] and tensors[1].tolist() == [2, 2, 2, 0]
    with pytest.raises(ValueError, match="beyond the end of its partition"):
        region(tensors, Fragment("c", 0, 1, 10))


def test_groups_that_are_not_one_flat_tensor_are_refused() -> None:
    with pytest.raises(LayoutError, match="each group is one flat partition"):
        group_partitions(*optimizer())


def test_a_parameter_without_a_partition_is_refused() -> None:
    flat, parameters = optimizer()
    for group in flat.param_groups:
        group["params"] = [torch.nn.Parameter(torch.zeros(12))]
    with pytest.raises(LayoutError, match="matrix is linked to its partition"):
        group_partitions(flat, parameters)


def test_a_parameter_that_others_hold_has_no_fragment() -> None:
    flat, parameters = optimizer()
    for group in flat.param_groups:
        group["params"] = [torch.nn.Parameter(torch.zeros(12))]
    for parameter in parameters.values():
        parameter._hp_mapping = None  # type: ignore[attr-defined]
    assert [partition.fragments for partition in group_partitions(flat, parameters)] == [(), ()]


def test_a_parameter_that_is_cut_keeps_its_shape_and_a_flat_part() -> None:
    full, cut = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(0))
    marked: Any = cut
    marked.ds_shape, marked.ds_tensor = torch.Size((4, 5)), torch.arange(10.0)
    assert local_shape(full) == (2, 3) and local_shape(cut) == (4, 5)
    assert own_part(cut).tolist() == list(range(10))
    with pytest.raises(LayoutError, match="ZeRO-3 keeps a flat part"):
        own_part(full)
