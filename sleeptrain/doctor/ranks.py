"""What several processes do together: a sum over all, megatron-core's layers, a step of DeepSpeed's engine.

On a machine with GPUs one process for each, over NCCL; without, two over gloo. They meet over a file, so that neither a
launcher's variables nor a port is in the way.
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
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}  # of the largest value; on a GPU Muon orthogonalises in bf16
TIMEOUT = timedelta(seconds=100)  # the checks' own limits come first, but for the sake of a message
OPTIM = OptimConfig(muon_lr=0.1, adamw_lr=0.1)


def check_collective(case: Case) -> Finding:
    """The sum of a known tensor over all processes, and of numbers on the CPU, which runs agree on things by."""
    device = _meet(case)
    wanted = case.size * (case.size + 1) / 2
    groups = {dist.get_backend(): (None, device), "gloo": (dist.new_group(backend="gloo"), torch.device("cpu"))}
    for backend, (group, place) in groups.items():
        x = torch.full((NUMBERS,), float(case.rank + 1), device=place)
        dist.all_reduce(x, group=group)
        if not bool((x == wanted).all()):
            return failed(f"{backend}: a sum over {case.size} processes is wrong ({x[0]:g}, not {wanted:g})", LINK)
    return ok(f"{' and '.join(groups)} over {case.size} process{'es' if case.size > 1 else ''}", size=case.size)


def check_tensor(case: Case) -> Finding:
    """megatron-core's column and row parallel layers against the whole product, with the gradient of their input."""
    if (absent := _absent(case, "megatron.core")) is not None:
        return absent
    device = _meet(case)
    from sleeptrain.distributed.mesh import Mesh
    from sleeptrain.parallel.tensor.regions import ColumnLinear, RowLinear, enter

    axis = Mesh.build(case.size, 1, TIMEOUT).tensor
    inner = WIDTH * case.size
    up, down, x = (_normal(device, *shape) for shape in ((inner, WIDTH), (WIDTH, inner), (4, WIDTH)))
    column, row = ColumnLinear(WIDTH, WIDTH, axis).to(device), RowLinear(WIDTH, WIDTH, axis).to(device)
    own = slice(WIDTH * axis.rank, WIDTH * (axis.rank + 1))
    with torch.no_grad():
        column.weight.copy_(up[own])
        row.weight.copy_(down[:, own])
    entered, whole = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = row(F.silu(column(enter(entered, axis)))), F.silu(whole @ up.T) @ down.T
    found.square().sum().backward()
    wanted.square().sum().backward()
    pairs = {"output": (found, wanted), "gradient": (entered.grad, whole.grad)}
    _part()
    for what, (a, b) in pairs.items():
        error = _error(a, b)
        if not error < TOLERANCE[device.type]:
            return failed(f"a layer over {case.size} ranks: its {what} is {error:.1e} off the whole", REINSTALL)
    return ok(f"a layer over {case.size} rank{'s' if case.size > 1 else ''} equals the whole")


def check_zero(case: Case) -> Finding:
    """A clipped step of DeepSpeed's engine over replicas, Muon and AdamW, against the same step by one process."""
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
    x, whole = _normal(device, case.size, WIDTH), copy.deepcopy(model)
    engine = wrap(model, roles, OPTIM, zero, mesh)
    engine.backward(engine.forward(lambda part: part(x[case.rank]).square().sum()))
    norm = engine.step(1.0)
    optim = Optimizers(roles, dict(whole.named_parameters()), OPTIM)
    whole(x).square().sum().backward()
    wanted_norm = float(optim.clip(OPTIM.clip_norm))
    optim.step(1.0)
    error = max(_error(engine.forward(lambda part: part(x)), whole(x)), abs(norm / wanted_norm - 1))
    _part()
    if not error < TOLERANCE[device.type]:
        said = f"a step under ZeRO-{zero} over {case.size} replicas is {error:.1e} off that of one process"
        return failed(said, REINSTALL)
    return ok(f"a step under ZeRO-{zero} over {case.size} replica{'s' if case.size > 1 else ''} equals one process's")


def _meet(case: Case) -> torch.device:
    """Joins the others, once; this process's device."""
    gpu = wants_gpus(case) and torch.cuda.is_available()
    device = torch.device("cuda", case.rank) if gpu else torch.device("cpu")
    if dist.is_initialized():
        return device
    torch.set_num_threads(1)
    places = {"RANK": case.rank, "LOCAL_RANK": case.rank, "WORLD_SIZE": case.size, "LOCAL_WORLD_SIZE": case.size}
    os.environ |= {name: str(place) for name, place in places.items()}
    if gpu:
        torch.cuda.set_device(device)
    backend, store = "nccl" if gpu else "gloo", dist.FileStore(str(case.folder / "store"), case.size)
    dist.init_process_group(backend, store=store, rank=case.rank, world_size=case.size, timeout=TIMEOUT)
    return device


def _absent(case: Case, module: str) -> Finding | None:
    """Where a package is not installed: red for a run that needs it."""
    from sleeptrain.distributed.launch import PACKAGES, installed

    if installed(module):
        return None
    said, cure = f"{PACKAGES[module]} is not installed", "pip install 'sleeptrain[parallel]'"
    parallel = None if case.config is None else case.config.parallel
    if parallel is not None and parallel.tensor * parallel.pipeline > 1:
        return failed(f"{said}, and the settings ask for several processes", cure)
    return skipped(f"{said}; training in several processes needs it: {cure}")


def _part() -> None:
    """megatron-core's groups are made anew by each check. All wait: one that leaves early looks like a failure."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()


def _normal(device: torch.device, *shape: int) -> torch.Tensor:
    """The same numbers in every process."""
    draw = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=draw).to(device) / shape[-1] ** 0.5


def _error(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    assert found is not None and wanted is not None
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
