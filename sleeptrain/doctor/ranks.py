"""Checks over several processes: an all-reduce, the layers of megatron-core, a step of DeepSpeed's engine.

A machine with GPUs runs one process for each, over NCCL; a machine without runs two, over gloo. They meet through a
file, independent of a launcher's variables and of free ports.
"""

from __future__ import annotations

import copy
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import OptimConfig
from sleeptrain.doctor.driver import wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped

LINK = "set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to a working interface; NCCL_DEBUG=INFO says more"
REINSTALL = "pip install 'sleeptrain[parallel]' in the versions that it declares"
NUMBERS = 1 << 20
WIDTH = 16
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}  # share of the largest value; on a GPU Muon orthogonalises in bf16
TIMEOUT = timedelta(seconds=100)  # below the limits in checks.py: a collective that hangs raises its own message first
OPTIM = OptimConfig(muon_lr=0.1, adamw_lr=0.1)


def check_collective(case: Case) -> Finding:
    """All-reduce a known tensor on the device, and over gloo on the CPU, which runs use to agree on values."""
    device = _meet(case)
    expected = case.size * (case.size + 1) / 2
    groups = {dist.get_backend(): (None, device), "gloo": (dist.new_group(backend="gloo"), torch.device("cpu"))}
    for backend, (group, place) in groups.items():
        x = torch.full((NUMBERS,), float(case.rank + 1), device=place)
        dist.all_reduce(x, group=group)
        if not bool((x == expected).all()):
            return failed(f"{backend}: a sum over {case.size} processes is wrong ({x[0]:g}, not {expected:g})", LINK)
    return ok(f"{' and '.join(groups)} over {case.size} process{'es' if case.size > 1 else ''}", size=case.size)


def check_tensor(case: Case) -> Finding:
    """Compare megatron-core's column and row parallel layers with the unsharded product, input gradient included."""
    if (absent := _absent(case, "megatron.core")) is not None:
        return absent
    device = _meet(case)
    from sleeptrain.distributed.mesh import Mesh
    from sleeptrain.parallel.tensor.collectives import enter
    from sleeptrain.parallel.tensor.regions import ColumnLinear, RowLinear

    axis = Mesh.build(case.size, 1, TIMEOUT).tensor
    inner = WIDTH * case.size
    up, down, x = (_normal(device, *shape) for shape in ((inner, WIDTH), (WIDTH, inner), (4, WIDTH)))
    column, row = ColumnLinear(WIDTH, WIDTH, axis).to(device), RowLinear(WIDTH, WIDTH, axis).to(device)
    shard = slice(WIDTH * axis.rank, WIDTH * (axis.rank + 1))
    with torch.no_grad():
        column.weight.copy_(up[shard])
        row.weight.copy_(down[:, shard])
    sharded_input, full_input = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = row(F.silu(column(enter(sharded_input, axis)))), F.silu(full_input @ up.T) @ down.T
    actual.square().sum().backward()
    expected.square().sum().backward()
    pairs = {"output": (actual, expected), "gradient": (sharded_input.grad, full_input.grad)}
    _leave_groups()
    for what, (a, b) in pairs.items():
        error = _error(a, b)
        if not error < TOLERANCE[device.type]:
            return failed(f"a layer over {case.size} ranks: its {what} is {error:.1e} off the unsharded one", REINSTALL)
    return ok(f"a layer over {case.size} rank{'s' if case.size > 1 else ''} equals the unsharded layer")


def check_zero(case: Case) -> Finding:
    """Compare a clipped step of DeepSpeed's engine over replicas (Muon and AdamW) with the same step of one process."""
    for module in ("megatron.core", "deepspeed"):
        if (absent := _absent(case, module)) is not None:
            return absent
    device = _meet(case)
    from sleeptrain.distributed.mesh import Mesh
    from sleeptrain.optim.optimizers import Optimizers, ParameterRole
    from sleeptrain.parallel.zero.engine import wrap

    mesh = Mesh.build(1, 1, TIMEOUT)
    zero = 1 if case.config is None else case.config.parallel.zero
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH).to(device)
    roles = {"weight": ParameterRole("muon"), "bias": ParameterRole("adamw")}
    x, single = _normal(device, case.size, WIDTH), copy.deepcopy(model)
    engine = wrap(model, roles, OPTIM, zero, mesh)
    engine.backward(engine.forward(lambda part: part(x[case.rank]).square().sum()))
    norm = engine.step(1.0)
    optim = Optimizers(roles, dict(single.named_parameters()), OPTIM)
    single(x).square().sum().backward()
    expected_norm = float(optim.clip(OPTIM.clip_norm))
    optim.step(1.0)
    error = max(_error(engine.forward(lambda part: part(x)), single(x)), abs(norm / expected_norm - 1))
    _leave_groups()
    if not error < TOLERANCE[device.type]:
        problem = f"a step under ZeRO-{zero} over {case.size} replicas is {error:.1e} off that of one process"
        return failed(problem, REINSTALL)
    return ok(f"a step under ZeRO-{zero} over {case.size} replica{'s' if case.size > 1 else ''} equals one process's")


def _meet(case: Case) -> torch.device:
    """Join the process group on the first call. Returns the device of this process."""
    gpu = wants_gpus(case) and torch.cuda.is_available()
    device = torch.device("cuda", case.rank) if gpu else torch.device("cpu")
    if dist.is_initialized():
        return device
    torch.set_num_threads(1)
    variables = {"RANK": case.rank, "LOCAL_RANK": case.rank, "WORLD_SIZE": case.size, "LOCAL_WORLD_SIZE": case.size}
    os.environ |= {name: str(value) for name, value in variables.items()}
    if gpu:
        torch.cuda.set_device(device)
    backend, store = "nccl" if gpu else "gloo", dist.FileStore(str(case.folder / "store"), case.size)
    dist.init_process_group(backend, store=store, rank=case.rank, world_size=case.size, timeout=TIMEOUT)
    return device


def _absent(case: Case, module: str) -> Finding | None:
    """A finding if a package is not installed: a failure for a run that needs it. None if it is installed."""
    from sleeptrain.distributed.launch import PACKAGES, installed

    if installed(module):
        return None
    problem, cure = f"{PACKAGES[module]} is not installed", "pip install 'sleeptrain[parallel]'"
    parallel = None if case.config is None else case.config.parallel
    if parallel is not None and parallel.tensor * parallel.pipeline > 1:
        return failed(f"{problem}, and the settings ask for several processes", cure)
    return skipped(f"{problem}; training in several processes needs it: {cure}")


def _leave_groups() -> None:
    """Destroy megatron-core's groups, which each check creates. The barrier keeps a process from ending early, which
    would look like a failure.
    """
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()


def _normal(device: torch.device, *shape: int) -> torch.Tensor:
    """A random tensor, the same in every process."""
    draw = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=draw).to(device) / shape[-1] ** 0.5


def _error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert actual is not None and expected is not None
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())
