"""Which optimizer updates which parameter."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.optim.optimizers import ParameterRole
from sleeptrain.optim.param_groups import parameter_roles
from tests.models import tiny_model

ADAMW = ParameterRole("adamw", decay=False)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embedding.weight", ParameterRole("adamw", decay=True)),
        ("head.weight", ParameterRole("adamw", decay=True)),
        ("norm.weight", ADAMW),
        ("blocks.0.mixer_norm.weight", ADAMW),
        ("blocks.0.mlp.up_proj.weight", ParameterRole("muon")),
        ("blocks.0.mixer.o_proj.weight", ParameterRole("muon")),
        ("blocks.0.mixer.q_norm.weight", ADAMW),
        ("blocks.1.mixer.conv_weight", ADAMW),
        ("blocks.1.mixer.A_log", ADAMW),
        ("blocks.1.mixer.in_proj_a.weight", ParameterRole("adamw", decay=True)),
        (
            "blocks.1.mixer.in_proj_qkv.weight",
            ParameterRole("muon", True, (slice(0, 16), slice(16, 32), slice(32, 56))),
        ),
        ("blocks.2.mixer.conv_bias", ADAMW),
    ],
)
def test_roles(name: str, role: ParameterRole) -> None:
    assert parameter_roles(tiny_model(tie_embeddings=False))[name] == role


def test_every_parameter_has_a_role_and_queries_and_gates_are_separate_blocks() -> None:
    model = tiny_model()
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    queries, gates = roles["blocks.0.mixer.q_proj.weight"].blocks or ()
    assert torch.equal(torch.as_tensor(queries)[:9], torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 16]))
    assert torch.equal(torch.cat([queries, gates]).sort().values, torch.arange(64))
