"""Muon and AdamW as one optimizer: roles, clipping of the raw gradients, rates, and a state by name."""

import copy
import io

import pytest
import torch
from torch import nn

from sleeptrain.config.schema import OptimConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.optim.muon import Muon
from sleeptrain.optim.optimizers import Optimizers, ParameterRole

ROLES = {
    "embedding.weight": ParameterRole("adamw", decay=True),
    "fused.weight": ParameterRole("muon", blocks=(slice(0, 4), torch.tensor([5, 7]), torch.tensor([4, 6]))),
    "out.weight": ParameterRole("muon"),
    "out.bias": ParameterRole("adamw", decay=False),
}


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.fused = nn.Linear(6, 8, bias=False)
        self.out = nn.Linear(8, 3)


def make(dtype: torch.dtype = torch.float64, **settings: object) -> tuple[Net, Optimizers]:
    net = Net().to(dtype)
    return net, Optimizers(ROLES, dict(net.named_parameters()), OptimConfig(**settings))  # type: ignore[arg-type]


def set_gradients(net: nn.Module, step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in net.parameters():
        p.grad = (size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def run(net: Net, optim: Optimizers, first: int, last: int) -> None:
    for step in range(first, last):
        optim.zero_grad()
        set_gradients(net, step)
        optim.clip(1.0)
        optim.step(1.0 / (step + 1))


def test_each_parameter_is_updated_by_its_own_optimizer() -> None:
    """Against one plain optimizer for each parameter, each with the settings of its role."""
    config = OptimConfig(muon_weight_decay=0.3, adamw_weight_decay=0.2)
    net, reference = Net().double(), Net().double()
    optim = Optimizers(ROLES, dict(net.named_parameters()), config)
    parameters = dict(reference.named_parameters())
    muon = Muon(
        [parameters["fused.weight"], parameters["out.weight"]],
        config.muon_lr,
        config.muon_momentum,
        config.muon_weight_decay,
        blocks={parameters["fused.weight"]: ROLES["fused.weight"].blocks or ()},
    )
    common = {"lr": config.adamw_lr, "betas": (0.9, 0.95), "eps": 1e-8}
    adamw = [
        torch.optim.AdamW([parameters["embedding.weight"]], weight_decay=0.2, foreach=False, **common),
        torch.optim.AdamW([parameters["out.bias"]], weight_decay=0.0, foreach=False, **common),
    ]
    for step, scale in enumerate((1.0, 0.25, 0.5)):
        set_gradients(net, step)
        set_gradients(reference, step)
        optim.step(scale)
        for optimizer, lr in [(muon, config.muon_lr), *((a, config.adamw_lr) for a in adamw)]:
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=0, atol=1e-15, msg=lambda m, name=name: f"{name}: {m}")


def test_a_rate_of_zero_moves_nothing() -> None:
    net, optim = make()
    before = copy.deepcopy(net.state_dict())
    set_gradients(net, 0)
    optim.step(0.0)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


@pytest.mark.parametrize(("size", "max_norm"), [(1.0, 1.0), (1.0, 0.3), (1e-3, 1.0)])
def test_clipping_equals_torch(size: float, max_norm: float) -> None:
    net, optim = make()
    reference = Net().double()
    set_gradients(net, 0, size)
    set_gradients(reference, 0, size)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    norm = optim.clip(max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)


def test_clipping_scales_all_gradients_once_by_one_factor() -> None:
    net, optim = make()
    set_gradients(net, 0)
    before = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    norm = float(optim.clip(0.5))
    assert norm == pytest.approx(float(sum(g.square().sum() for g in before.values())) ** 0.5, rel=1e-14)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * (0.5 / (norm + 1e-6)), rtol=1e-14, atol=0)
    assert float(optim.clip(0.5)) == pytest.approx(0.5 * norm / (norm + 1e-6), rel=1e-14)


def test_clipping_comes_before_momentum() -> None:
    """Muon ignores the size of one gradient, but a clipped first gradient weighs less in the momentum of the second."""
    net, optim = make()
    set_gradients(net, 0, size=100.0)
    optim.clip(1.0)
    optim.step(1.0)
    assert net.out.weight.grad is not None
    kept = optim.state_dict()["muon"]["out.weight"]["momentum_buffer"]
    torch.testing.assert_close(kept, (1 - 0.95) * net.out.weight.grad, rtol=1e-14, atol=0)
    assert float(kept.norm()) < 0.05


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_returned_and_nothing_scaled(bad: float, max_norm: float) -> None:
    net, optim = make()
    set_gradients(net, 0)
    assert net.out.bias.grad is not None and net.fused.weight.grad is not None
    net.out.bias.grad[1] = bad
    before = net.fused.weight.grad.clone()
    norm = optim.clip(max_norm)
    assert str(float(norm)) == str(bad)
    assert torch.equal(net.fused.weight.grad, before)


def test_zero_only_measures() -> None:
    net, optim = make()
    set_gradients(net, 0)
    assert net.out.weight.grad is not None
    before = net.out.weight.grad.clone()
    assert float(optim.clip(0.0)) > 1
    assert torch.equal(net.out.weight.grad, before)
    optim.zero_grad()
    assert net.out.weight.grad is None and float(optim.clip(1.0)) == 0.0


def test_norms_of_half_precision_gradients_are_fp32() -> None:
    net, optim = make(torch.bfloat16)
    for p in net.parameters():
        p.grad = torch.full_like(p, 1.0)
    count = sum(p.numel() for p in net.parameters())
    norm = optim.clip(0.0)
    assert norm.dtype == torch.float32 and float(norm) == pytest.approx(count**0.5, rel=1e-6)


def test_state_goes_through_a_file_by_name_exactly() -> None:
    """Three steps, a save, a load into optimizers whose parameters come in another order, three steps."""
    straight, straight_optim = make(torch.float32)
    run(straight, straight_optim, 0, 6)
    net, optim = make(torch.float32)
    run(net, optim, 0, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optim": optim.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Net(seed=5)
    other.load_state_dict(saved["net"])
    reordered = dict(reversed(list(other.named_parameters())))
    resumed = Optimizers(dict(reversed(ROLES.items())), reordered, OptimConfig())
    resumed.load_state_dict(saved["optim"])
    run(other, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True))


def test_state_names() -> None:
    net, optim = make()
    assert optim.state_dict() == {
        "muon": {"fused.weight": {}, "out.weight": {}},
        "adamw": {"embedding.weight": {}, "out.bias": {}},
    }
    run(net, optim, 0, 1)
    state = optim.state_dict()
    assert set(state["adamw"]["out.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    _, other = make()
    other.load_state_dict(state)
    assert other.state_dict()["muon"]["out.weight"]["momentum_buffer"].abs().sum() > 0
    _, empty = make()
    other.load_state_dict(empty.state_dict())
    assert other.state_dict()["adamw"]["out.bias"] == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["muon"].pop("out.weight"), "out.weight is trained by muon in the model but not in the checkpoint"),
        (lambda s: s["adamw"].update(new={}), "new is trained by adamw in the checkpoint but not in the model"),
        (lambda s: s["adamw"]["out.bias"].pop("exp_avg"), "out.bias has exp_avg_sq, step where adamw keeps"),
        (lambda s: s["muon"]["out.weight"].update(momentum_buffer=torch.zeros(2, 3)), r"\(2, 3\) in the checkpoint"),
        (lambda s: s["muon"]["out.weight"].update(momentum_buffer=torch.zeros(3, 8)), "float32"),
        (lambda s: s.pop("muon"), "is trained by muon in the model"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    net, optim = make()
    run(net, optim, 0, 2)
    before = copy.deepcopy(optim.state_dict())
    broken = copy.deepcopy(before)
    broken["adamw"]["embedding.weight"]["exp_avg"].fill_(7)
    damage(broken)
    with pytest.raises(DataError, match=message):
        optim.load_state_dict(broken)
    after = optim.state_dict()
    assert torch.equal(after["adamw"]["embedding.weight"]["exp_avg"], before["adamw"]["embedding.weight"]["exp_avg"])


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("out.bias", None, "out.bias is trainable but has no role"),
        ("out.bias", ParameterRole("muon"), r"out.bias of shape \(3,\) is no matrix"),
        ("out.bias", ParameterRole("sgd"), "out.bias has the role 'sgd'"),
        ("out.biases", ParameterRole("adamw"), "out.biases has a role but"),
        ("embedding.weight", ParameterRole("adamw", blocks=(slice(0, 11),)), "embedding.weight has blocks"),
        ("fused.weight", ParameterRole("muon", blocks=(slice(0, 7),)), "fused.weight: blocks must hold each of the 8"),
    ],
)
def test_roles_that_do_not_fit_name_the_parameter(name: str, role: ParameterRole | None, message: str) -> None:
    roles = {**ROLES, name: role}
    if role is None:
        del roles[name]
    with pytest.raises(ConfigError, match=message):
        Optimizers(roles, dict(Net().named_parameters()), OptimConfig())  # type: ignore[arg-type]


def test_one_parameter_under_two_names_is_refused() -> None:
    net = Net()
    parameters = {**dict(net.named_parameters()), "head.weight": net.embedding.weight}
    with pytest.raises(ConfigError, match=r"embedding\.weight and head\.weight are one parameter"):
        Optimizers({**ROLES, "head.weight": ParameterRole("adamw")}, parameters, OptimConfig())


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.muon_scaling"):
        make(muon_scaling="kimi")


def test_frozen_parameters_are_omitted_and_one_kind_is_enough() -> None:
    net = Net()
    net.fused.weight.requires_grad_(False)
    net.out.weight.requires_grad_(False)
    optim = Optimizers(ROLES, dict(net.named_parameters()), OptimConfig())
    for p in (net.embedding.weight, net.out.bias):
        p.grad = torch.ones_like(p)
    before = net.fused.weight.clone()
    optim.step(1.0)
    assert torch.equal(net.fused.weight, before)
    assert optim.state_dict()["muon"] == {} and set(optim.state_dict()["adamw"]) == {"embedding.weight", "out.bias"}
    optim.load_state_dict(optim.state_dict())
