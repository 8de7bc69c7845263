"""The recurrences with this machine's kernels, compared with the token loop in fp64, gradients of states included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from sleeptrain import ops
from sleeptrain.doctor.driver import wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok
from sleeptrain.doctor.packages import fits, requirements
from sleeptrain.ops import dispatch, reference

Op = Callable[..., tuple[torch.Tensor, torch.Tensor]]

HOPPER = 9  # the first part of the compute capability of an H100 or H200
TOKENS, HEADS, WIDTH = 100, 2, 64
TOLERANCE = {"chunked": 1e-4, "fla": 1e-2}  # share of the largest value; a GPU multiplies in TF32
PARTS = {
    "gated_delta_rule": ("output", "state", "q", "k", "v", "g", "beta", "initial state"),
    "ssd": ("output", "state", "C", "B", "x", "dt", "A", "initial state"),
}


def check_kernel(case: Case) -> Finding:
    """Compare outputs, states and gradients of Gated DeltaNet and of Mamba-2 (SSD) with the reference."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if wants_gpus(case) and torch.cuda.is_available() else "cpu")
    chosen = dispatch.choose("auto", "save", torch.empty(0, device=device))
    if chosen == "fla" and (failure := judge_triton()) is not None:
        return failure
    worst = {}
    for name, inputs in (("gated_delta_rule", _delta_inputs()), ("ssd", _ssd_inputs())):
        actual = _outcome(getattr(ops, name), [x.float().to(device) for x in inputs])
        expected = _outcome(getattr(reference, name), inputs)
        errors = dict(zip(PARTS[name], map(_error, actual, expected), strict=True))
        part = max(errors, key=lambda key: errors[key])
        worst[name] = errors[part]
        if not errors[part] < TOLERANCE[chosen]:
            what = part if part in ("output", "state") else f"gradient of {part}"
            problem = f"{name} ({chosen} on {device}): {what} is {errors[part]:.1e} off the token loop"
            return failed(problem, _cure(chosen), errors=errors)
    listed = ", ".join(f"{name} {error:.0e}" for name, error in worst.items())
    return ok(f"{chosen} on {device}, off the token loop by {listed}", **worst)


def judge_triton() -> Finding | None:
    """A failure if the backward of Gated DeltaNet would raise. Reads the version from the module: vendors rename the
    package.
    """
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability()[0] != HOPPER:
        return None
    version = importlib.import_module("triton").__version__
    [wanted] = [r for r in requirements("gpu") if r.name == "triton"]
    if fits(wanted, version):
        return None
    problem = f"Triton {version} is not {wanted.specifier}: flash-linear-attention has no gradients on a Hopper GPU"
    return failed(problem, "install torch 2.13, which brings Triton 3.7.1, or take a base image that has them")


def _cure(chosen: str) -> str:
    if chosen == "fla":
        return "install the triton that this torch asks for and flash-linear-attention anew; clear ~/.triton/cache"
    return "reinstall torch for this processor, and sleeptrain; if it stays, have the machine's memory tested"


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double().cpu() - expected).abs().max() / expected.abs().max())


def _outcome(op: Op, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Output, last state, and the gradients of all inputs under random cotangents of output and state."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = op(*leaves[:5], initial_state=leaves[5])
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def _normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _delta_inputs() -> list[torch.Tensor]:
    """fp64 q, k (unit length), v [1, T, H, K], g, beta [1, T, H], initial state [1, H, K, V]."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (_normal(draw, 1, TOKENS, HEADS, WIDTH) for _ in range(3))
    g, beta = (_normal(draw, 1, TOKENS, HEADS).sigmoid() for _ in range(2))
    S = _normal(draw, 1, HEADS, WIDTH, WIDTH)
    return [torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1), v, -g, beta, S]


def _ssd_inputs() -> list[torch.Tensor]:
    """fp64 C, B [1, T, 1, K], x [1, T, H, V], dt [1, T, H], A [H], initial state [1, H, K, V]."""
    draw = torch.Generator().manual_seed(0)
    C, B = (_normal(draw, 1, TOKENS, 1, WIDTH) for _ in range(2))
    x, dt = _normal(draw, 1, TOKENS, HEADS, WIDTH), _normal(draw, 1, TOKENS, HEADS).sigmoid()
    A, S = -_normal(draw, HEADS).sigmoid(), _normal(draw, 1, HEADS, WIDTH, WIDTH)
    return [C, B, x, dt, A, S]
