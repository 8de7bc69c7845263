"""The refusal of a checkpoint names the parameters that do not fit; settings name those that may differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sleeptrain.checkpoint.fit import check_resume, check_start
from sleeptrain.checkpoint.read import Form
from sleeptrain.errors import DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim.optimizers import STATE
from sleeptrain.optim.param_groups import parameter_roles
from tests.models import tiny_config

Forms = dict[str, Form]


def forms(stepped: bool = True) -> Forms:
    """The tensors that a checkpoint of the tiny model holds."""
    model = Hybrid(tiny_config())
    found = {f"model/{name}": Form(tuple(p.shape), torch.float32) for name, p in model.named_parameters()}
    if stepped:
        for name, role in parameter_roles(model).items():
            for key in STATE[role.kind]:
                shape = () if key == "step" else found[f"model/{name}"].shape
                found[f"optim/{role.kind}/{name}/{key}"] = Form(shape, torch.float32)
    return found | {"rng/torch": Form((5056,), torch.uint8), "carried/1.S_BHKV": Form((2, 4, 8, 6), torch.float32)}


def test_a_checkpoint_that_fits() -> None:
    check_resume(forms(), tiny_config())
    check_resume(forms(stepped=False), tiny_config())
    check_start(forms(), tiny_config())


def drop(name: str) -> Callable[[Forms], object]:
    return lambda found: found.pop(name)


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Forms], object]:
    return lambda found: found.update({name: Form(shape, dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model/norm.weight"), r"1 of the model's parameters are missing \(norm.weight\); a run goes on with"),
        (put("model/new.weight", 3), r"1 are not in the model \(new.weight\)"),
        (put("model/norm.weight", 3), r"model/norm.weight is torch.float32 of shape \[3\] there, .* of shape \[16\]"),
        (put("model/norm.weight", 16, dtype=torch.bfloat16), "norm.weight is torch.bfloat16"),
        (drop("optim/adamw/norm.weight/exp_avg"), r"only .*/exp_avg_sq, .* of the state of norm.weight"),
        (put("optim/adamw/norm.weight/exp_avg", 3), r"optim/adamw/norm.weight/exp_avg is .* of shape \[3\]"),
        (put("optim/adamw/norm.weight/step", 1), r"step is .* of shape \[1\]"),
        (put("optim/muon/norm.weight/momentum_buffer", 16), "optimizers do not keep .*muon/norm.weight"),
        (lambda found: [drop(n)(found) for n in list(found) if "/blocks.0" in n], r"11 of .* missing \(.*, \.\.\."),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(change: Callable[[Forms], object], message: str) -> None:
    found = forms()
    change(found)
    with pytest.raises(DataError, match=message):
        check_resume(found, tiny_config())


SHORTER = tiny_config(["attention", "gated_deltanet"])
LONGER = tiny_config(["attention", "gated_deltanet", "mamba2", "mamba2"])


def test_layers_are_added_or_dropped_only_where_settings_say_so() -> None:
    with pytest.raises(DataError, match=r"are not in the model \(blocks.2.*name them in run.init_new"):
        check_start(forms(), SHORTER)
    check_start(forms(), SHORTER, dropped=["blocks.2.*"])
    with pytest.raises(DataError, match=r"parameters are missing \(blocks.3.*run.init_new"):
        check_start(forms(), LONGER)
    check_start(forms(), LONGER, new=["blocks.3.*"])
    check_start(forms(), LONGER, new=["blocks.*"])  # a pattern says nothing of parameters that both have
    with pytest.raises(DataError, match=r"run.init_new: nothing .* matches 'block.3'; remove or correct it"):
        check_start(forms(), LONGER, new=["blocks.3.*", "block.3"])
    with pytest.raises(DataError, match=r"run.init_dropped: nothing .* matches 'blocks.3.\*'"):
        check_start(forms(), LONGER, new=["blocks.3.*"], dropped=["blocks.3.*"])
    other = forms() | {"model/norm.weight": Form((3,), torch.float32)}
    with pytest.raises(DataError, match=r"norm.weight is torch.float32 of shape \[3\]"):
        check_start(other, LONGER, new=["blocks.3.*", "*"])
