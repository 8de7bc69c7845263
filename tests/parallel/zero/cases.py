"""Steps of a small model: in one process, and by data ranks under ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sleeptrain.checkpoint.place import Placed
from sleeptrain.config.schema import OptimConfig, SleepConfig, TrainConfig
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.linear import read_narrow
from sleeptrain.optim.optimizers import KINDS, Optimizers
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.tensor.sharding import ModelSharding
from sleeptrain.parallel.zero.engine import ZeroEngine, wrap
from sleeptrain.parallel.zero.state import load, local_tensors
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.rounds import Round, plan_batch, windows_of
from tests.checkpoint.contents import InMemory, flat, nested, of_shares
from tests.models import random_batch, tiny_config

WINDOW, PASSES, ROWS, NUM_TARGETS = 4, 2, 4, 4 * 11
RATES = (1.0, 0.5, 0.25)
# Small enough to clip every step of these models, large enough for the norm's 1e-6 to be seen.
OPTIM = OptimConfig(muon_lr=0.02, adamw_lr=0.01, muon_weight_decay=0.1, adamw_weight_decay=0.1, clip_norm=0.05)


def small_model(seed: int = 0, layers: list[str] | None = None) -> Hybrid:
    torch.manual_seed(seed)
    model = Hybrid(tiny_config(layers, init_std=0.1))
    model.init_weights(seed)
    return model


def step_batch(step: int) -> Batch:
    return random_batch([[0] * 12] * ROWS, seed=100 + step)


def planned(batch: Batch) -> list[Round]:
    return plan_batch(batch, WINDOW, PASSES, SleepConfig())


def share_of_loss(model: Hybrid, batch: Batch, bf16: bool = False) -> torch.Tensor:
    """This batch's part of the loss of the step, which is a mean over all rows' targets."""
    settings = LoopSettings((0, model.num_layers))
    with in_precision(TrainConfig(tokens=1, precision="bf16" if bf16 else "fp32"), model):
        losses, _ = run_rounds(model, batch, planned(batch), model.empty_state(), settings)
    return torch.stack(list(losses.values())).sum() / NUM_TARGETS


def single_process(
    make: Callable[[], Hybrid] = small_model, steps: int = 3, bf16: bool = False, config: OptimConfig = OPTIM
) -> dict[str, Any]:
    """Losses, norms, weights and optimizer state after some steps on whole batches. They are computed once."""
    key = (make, steps, bf16, repr(config))
    if key not in _DONE:
        _DONE[key] = _steps_of_one(make, steps, bf16, config)
    return deepcopy(_DONE[key])


_DONE: dict[tuple[object, ...], dict[str, Any]] = {}


def _steps_of_one(make: Callable[[], Hybrid], steps: int, bf16: bool, config: OptimConfig) -> dict[str, Any]:
    model = make()
    optim = Optimizers(parameter_roles(model), dict(model.named_parameters()), config)
    losses, norms = [], []
    for step in range(steps):
        optim.zero_grad()
        loss = share_of_loss(model, step_batch(step), bf16)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(optim.clip(config.clip_norm)))
        optim.step(RATES[step])
    return {"losses": losses, "norms": norms, "model": model.state_dict(), "optim": optim.state_dict()}


def rows_of(batch: Batch, rank: int, size: int) -> Batch:
    per_rank = ROWS // size
    return batch.rows(rank * per_rank, (rank + 1) * per_rank)


def whole_rounds(engine: ZeroEngine, batch: Batch, bf16: bool) -> torch.Tensor:
    loss = engine.forward(lambda model: share_of_loss(model, batch, bf16))
    engine.backward(loss)
    return loss.detach()


def row_by_row(engine: ZeroEngine, batch: Batch, bf16: bool) -> torch.Tensor:
    """Micro-batches of one row, a backward each."""
    rows = range(batch.tokens_BT.shape[0])
    return torch.stack([whole_rounds(engine, batch.rows(b, b + 1), bf16) for b in rows]).sum()


def differently(engine: ZeroEngine, batch: Batch, bf16: bool) -> torch.Tensor:
    """The first replica row by row, the others all rows at once."""
    with engine.sum_once():
        return (whole_rounds if engine.mesh.data.rank else row_by_row)(engine, batch, bf16)


def window_by_window(engine: ZeroEngine, batch: Batch, bf16: bool) -> torch.Tensor:
    """All forwards first, then a backward for each window, which passes the gradient of S to the window before."""
    model = engine.model
    settings, state, kept = LoopSettings((0, model.num_layers)), model.empty_state(), []
    for rounds in windows_of(planned(batch)):
        inputs = _leaves(state)
        losses, state = run_rounds(model, batch, rounds, inputs, settings)
        kept.append((inputs, sum(losses.values()) / NUM_TARGETS, state))
    gradients: list[torch.Tensor] = []
    for inputs, loss, after in reversed(kept):
        surrogate = loss
        if gradients:
            outputs = list(after.to_state_dict().values())
            surrogate = loss + sum((s * g).sum() for s, g in zip(outputs, gradients, strict=True))
        engine.backward(surrogate)
        gradients = [t.grad for t in inputs.to_state_dict().values()]
    return torch.stack([loss.detach() for _, loss, _ in kept]).sum()


def _leaves(state: Any) -> Any:
    named = {k: t.detach().requires_grad_() for k, t in state.to_state_dict().items()}
    return type(state).from_state_dict(named, len(state.layers))


def engine_for(
    full: Hybrid,
    zero: int,
    tensor: int = 1,
    config: OptimConfig = OPTIM,
    narrow: bool = False,
    shard: int | None = None,
) -> ZeroEngine:
    """An engine over this rank's part of a model. narrow: with bf16 weights. shard: as `parallel.shard_replicas`."""
    mesh, roles = Mesh.build(tensor, 1, shard_replicas=shard), parameter_roles(full)
    if tensor == 1:
        return wrap(full, roles, config, zero, mesh, narrow=read_narrow(full) if narrow else set())
    sharding, model = ModelSharding(full.config, tensor), build_model(full.config, mesh)
    weights = dict(full.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(sharding.take(name, weights[name], mesh.tensor.rank))
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    return wrap(model, roles, config, zero, mesh, sharding, shapes, read_narrow(model) if narrow else set())


def data_parallel(
    zero: int,
    pieces: Callable[..., torch.Tensor] = whole_rounds,
    make: Callable[[], Hybrid] = small_model,
    steps: Sequence[int] = range(3),
    bf16: bool = False,
    config: OptimConfig = OPTIM,
    saved: dict[str, Any] | None = None,
    tensor: int = 1,
    narrow: bool = False,
    shard: int | None = None,
) -> dict[str, Any]:
    """The results of `single_process`, from data ranks of `tensor` tensor ranks each; every rank calls it."""
    engine = engine_for(make(), zero, tensor, config, narrow, shard)
    data = engine.mesh.data
    if saved is not None:
        load(engine, InMemory(flat(saved)))
    losses, norms = [], []
    for step in steps:
        loss = pieces(engine, rows_of(step_batch(step), data.rank, data.size), bf16)
        dist.all_reduce(loss, group=data.group)
        losses.append(float(loss))
        norms.append(engine.step(RATES[step]))
    state = stage_state(engine)
    return {"losses": losses, "norms": norms, "state_bytes": state_bytes(engine.optimizer), **(state or {})}


def stage_state(engine: ZeroEngine) -> dict[str, Any] | None:
    """{"model", "optim"} as in one process, from the tensors of all processes of the stage; None but on the first."""
    own = {name: Placed(tensor.clone(), place) for name, (tensor, place) in local_tensors(engine).items()}
    group = parallel_state.get_tensor_and_data_parallel_group()
    everyone: list[dict[str, Placed]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    tree = nested(of_shares(everyone))
    if dist.get_rank(group) > 0:
        return None
    return {"model": tree["model"], "optim": {kind: tree["optim"].get(kind, {}) for kind in KINDS}}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(wanted)
    return max(float((found[n] - wanted[n]).abs().max()) for n in wanted)
