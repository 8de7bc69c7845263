"""DeepSpeed's ZeRO around one pipeline stage: gradients summed over data ranks, optimizer state sharded.

The weights that are updated, gradients and their sums are fp32 also under `train.precision=bf16`, as in one process.
Under ZeRO-1 the weights that the model computes with are then bf16 (`working_weights`); under the other stages they are
fp32, and linear layers multiply by bf16 copies of them. Results do not depend on it. DeepSpeed's bf16 mode is not used:
it casts every parameter, A_log and dt_bias included, assumes one dtype for all groups, and sums gradients in bf16.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from sleeptrain.config.schema import OptimConfig
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.errors import ConfigError
from sleeptrain.optim.optimizers import KINDS, ParameterRole
from sleeptrain.parallel.zero import limits, working_weights
from sleeptrain.parallel.zero.flat_gradients import FlatGradients
from sleeptrain.parallel.zero.flat_optimizer import FlatOptimizer, ModelStage, Partition, WholeOptimizer
from sleeptrain.parallel.zero.gathered import keep_gathered
from sleeptrain.parallel.zero.matrix_exchange import Shards, Unsharded
from sleeptrain.parallel.zero.mpu import MegatronUnit
from sleeptrain.parallel.zero.partitions import (
    group_partitions,
    parameter_partitions,
    require,
    whole_partitions,
)

T = TypeVar("T")


class ZeroEngine:
    """Backward and step of a stage under ZeRO."""

    def __init__(
        self,
        engine: Any,
        optimizer: FlatOptimizer,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        stage: ModelStage,
    ):
        self.model, self.optimizer, self.parameters = model, optimizer, parameters
        self.mesh, self.stage, self.deepspeed_engine = mesh, stage, engine
        self.zero = int(engine.zero_optimization_stage())
        self._has_gradients = self._summed = False
        if self.zero == 2:
            engine.set_gradient_accumulation_boundary(False)  # `step` sets it at the end of a step
        check_wide(parameters)
        partitions = self._partitions()
        if self.zero == 1:
            groups = optimizer.param_groups
            working_weights.narrow(engine.optimizer, [i for i, group in enumerate(groups) if group["narrow"]])
            working_weights.join_norms(engine.optimizer, [group["kind"] for group in groups])
        self._flat = FlatGradients(engine.optimizer, mesh.shard, mesh.copies) if self.zero == 1 else None
        optimizer.bind(partitions, stage)

    def freeze(self, stage: int) -> None:
        """Begin a stage of `sleeptrain.optim.freezing`: its frozen parameters get zero gradients and no updates."""
        self.optimizer.frozen_stage = stage

    def _partitions(self) -> list[Partition]:
        if self.zero == 0:
            return whole_partitions(self.optimizer, self.parameters)
        wrapped = self.deepspeed_engine.optimizer
        if self.zero == 3:
            require(hasattr(wrapped, "fp32_partitioned_groups_flat"), "ZeRO-3 lists its fp32 partitions")
            flats = wrapped.fp32_partitioned_groups_flat
            return parameter_partitions(self.optimizer, flats, self.parameters, self.mesh.data.rank)
        require(self.zero == 1 or hasattr(wrapped, "all_grad_tensors"), "ZeRO-2 lists the gradients it has summed")
        return group_partitions(self.optimizer, self.parameters)

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        """Return `function(model)`; ZeRO-3 gathers the weights during the call.

        Under ZeRO-3 a backward must start at a tensor that the function returned, directly or in a tuple, list or dict.
        The other ZeRO stages may also call the model directly.
        """
        return self.deepspeed_engine(function)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar to the step's gradient; call it any number of times before `step`.

        loss: this data rank's part of the step's loss (which is the sum over data ranks), or a surrogate with the same
        gradient. Raises ConfigError for a second backward of a step under ZeRO-3: it would replace the first gradient.
        """
        if self.zero == 3 and self._has_gradients:
            raise ConfigError(
                "parallel.zero=3 takes one backward a step, and this step has several (train.micro_batch, "
                "sleep.bptt_windows); use parallel.zero=1 or 2"
            )
        self._has_gradients = True
        if self._flat is not None:
            loss.backward()
            return
        # ZeRO-3 can only average over data ranks; the other stages are configured to sum.
        self.deepspeed_engine.backward(loss * self.mesh.data.size if self.zero == 3 else loss)

    @contextmanager
    def sum_once(self) -> Iterator[None]:
        """Keep unsharded gradients in the backwards inside; under ZeRO-2, sum them over data ranks once, on exit.

        So replicas may run different backwards inside; under ZeRO-0 and 1 they always may, since these sum in `step`.
        On exit every parameter must have a gradient in all replicas, or in none. Not for ZeRO-3.
        """
        if self.zero < 2:
            yield
            return
        with self.deepspeed_engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                # DeepSpeed sums on exit after an error, too: without gradients no process waits for the others there.
                self.zero_grad()
                raise
        self._summed = True

    def step(self, scale: float, accepts: Callable[[float], bool] | None = None) -> float:
        """Sum the gradients over data ranks, clip them, and update at `scale` times the peak rates.

        Returns the norm of the gradient before clipping, over all ranks and both optimizers. If the norm is not finite,
        it returns infinity and changes nothing. accepts: called once with a finite norm; the update is made if it
        returns True. It must return the same value in all processes.
        """
        # DeepSpeed computes the norm before it calls the optimizer, group by group.
        norm = lambda: float(self.deepspeed_engine.optimizer._global_grad_norm)  # noqa: E731
        self.optimizer.accepts = cache(lambda: accepts is None or accepts(norm()))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        if self._flat is not None:
            self._flat.drop(p for name, p in self.parameters.items() if self.optimizer.is_frozen(name))
            self._flat.sum()
            self.deepspeed_engine.optimizer.step()
            self._flat.clear()
        elif self.zero == 2:
            self._step_summed()
        else:
            self.deepspeed_engine.step()
        self._has_gradients = False
        return norm()

    def _step_summed(self) -> None:
        """ZeRO-2: sum the gradients of the backwards, unless `sum_once` has done so, and step."""
        engine = self.deepspeed_engine
        if not self._summed:
            with engine.coalesce_grad_reduction():
                pass
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        engine.set_gradient_accumulation_boundary(False)
        self._summed = False

    def zero_grad(self) -> None:
        """Drop the gradients of all backwards since the last step."""
        if self._flat is None:
            self.deepspeed_engine.optimizer.zero_grad()
        elif self._has_gradients:
            self._flat.clear()
        if self.zero == 2:
            self.deepspeed_engine.optimizer.all_grad_tensors.clear()
            self.deepspeed_engine.optimizer.averaged_gradients.clear()
        self._has_gradients = self._summed = False


def wrap(
    model: nn.Module,
    roles: Mapping[str, ParameterRole],
    config: OptimConfig,
    zero: int,
    mesh: Mesh,
    shards: Shards | None = None,
    whole_shapes: Mapping[str, tuple[int, ...]] | None = None,
    narrow: Set[str] = frozenset(),
) -> ZeroEngine:
    """Make the engine of this process's stage. All processes of the mesh (from `Mesh.build`) call it together.

    model: this process's part of the model, fp32; its weights are made equal over the data ranks.
    roles: the role of each trainable parameter, as of the full parameter.
    shards: how tensor parallel shards form full parameters; needed with several tensor ranks.
    whole_shapes: the shapes of the full parameters; needed with several tensor ranks.
    narrow: the names of the parameters that the model reads in bf16 only; ZeRO-1 keeps them so.
    `layout_check` refuses combinations in which DeepSpeed would be wrong. Raises LayoutError if DeepSpeed lays out its
    partitions in an unknown way.
    """
    parameters = _trainable(model, roles)
    if mesh.tensor.size > 1 and (shards is None or whole_shapes is None):
        raise ValueError("several tensor ranks need `shards` and `whole_shapes`, from which full parameters are joined")
    local = {name: tuple(p.shape) for name, p in parameters.items()}
    apart = narrow if working_weights.are_narrow(zero) else frozenset[str]()
    optimizer = (WholeOptimizer if zero == 0 else FlatOptimizer)(roles, parameters, config, apart)
    for name, p in parameters.items():
        if roles[name].frozen and zero != 1:
            p.register_hook(partial(_unless_frozen, optimizer, name))
    deepspeed = load_deepspeed()
    engine, *_ = deepspeed.initialize(
        model=_Call(model),
        optimizer=optimizer,
        mpu=MegatronUnit(mesh),
        dist_init_required=False,
        config=_engine_config(zero, config, parameters),
    )
    if zero == 3:
        keep_gathered(deepspeed, engine.module, model)
    stage = ModelStage(mesh.state, mesh.tensor.rank, local, whole_shapes or local, shards or Unsharded())
    return ZeroEngine(engine, optimizer, model, parameters, mesh, stage)


def load_deepspeed() -> Any:
    """Load deepspeed: without log lines, on torch's device, over the torch.distributed that is already initialised.

    At its first use DeepSpeed runs compilers to find out which of its C++ extensions this machine can compile. On a CPU
    it then compiles a library for communication over shared memory, which takes minutes. No extension is used: gloo and
    NCCL communicate, and sleeptrain has its own optimizers. So the list of extensions is set to empty.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def check_wide(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError unless every parameter is fp32, decays included."""
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {p.dtype}, but the weights under parallel.zero are fp32; train.precision=bf16 casts them "
                "in the forward pass"
            )


def _unless_frozen(optimizer: FlatOptimizer, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, or zero if the parameter is frozen: DeepSpeed needs a gradient, and the norm must not count it."""
    return torch.zeros_like(gradient) if optimizer.is_frozen(name) else gradient


class _Call(nn.Module):
    """Calls a function with the model inside a forward, during which ZeRO-3 gathers weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        return function(self.model)


def _engine_config(zero: int, config: OptimConfig, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    total = sum(p.numel() for p in parameters.values())
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A step has any number of backwards and ends in step(). DeepSpeed sums the gradients of several backwards at
        # once only if it manages the accumulation. So it does under ZeRO-2, and `ZeroEngine` sets the end of the step.
        "managed_gradient_accumulation": zero == 2,
        # DeepSpeed's default would clip to 1. Under ZeRO-0 it reports no norm, and `WholeOptimizer` clips.
        "gradient_clipping": 0.0 if zero == 0 else config.clip_norm,
        "gradient_allreduce_op": "mean" if zero == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": False,
            "reduce_bucket_size": min(total, limits.MAX_BUCKET),
            "stage3_max_reuse_distance": limits.MAX_REUSE,
            "stage3_param_persistence_threshold": limits.PERSISTENT,
            "stage3_prefetch_bucket_size": limits.AHEAD,
        },
    }


def _trainable(model: nn.Module, roles: Mapping[str, ParameterRole]) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in parameters:
        if name not in roles:
            raise ConfigError(f"{name} is trainable but has no role; give it one of {', '.join(KINDS)}")
    check_wide(parameters)
    return parameters
