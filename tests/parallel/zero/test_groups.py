"""The groups of ZeRO's optimizer: by kind, and by width."""

from __future__ import annotations

import torch

from sleeptrain.model.linear import read_narrow
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.zero.groups import parameter_groups
from tests.parallel.zero import cases


def test_each_parameter_is_in_the_group_of_its_kind_and_width() -> None:
    model = cases.small_model()
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    narrow = read_narrow(model)
    assert "embedding.weight" in narrow and "norm.weight" not in narrow
    groups = list(parameter_groups(roles, parameters, cases.OPTIM, narrow))
    assert [(g["kind"], g["narrow"]) for g in groups] == [("muon", True), ("adamw", False), ("adamw", True)]
    for group in groups:
        assert all(torch.equal(p, parameters[n]) for n, p in zip(group["names"], group["params"], strict=True))
        assert all((roles[n].kind, n in narrow) == (group["kind"], group["narrow"]) for n in group["names"])
    assert sorted(name for group in groups for name in group["names"]) == sorted(parameters)
    same = list(parameter_groups(roles, parameters, cases.OPTIM, set()))
    assert [group["kind"] for group in same] == ["muon", "adamw"] and same[0]["decay"] == 0.1
