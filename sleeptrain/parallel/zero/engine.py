"""DeepSpeed's ZeRO around one pipeline stage: gradients summed over data ranks, optimizer state sharded.

The engine's weights are fp32 under `train.precision=bf16` too, and the loop runs under autocast as in one process.
DeepSpeed's own bf16 mode casts every parameter, the decays included, assumes one dtype for all groups, and sums
gradients in it. So A_log and dt_bias are never narrow and results do not depend on the layout; the price is that the
gathered weights and their gradients take four bytes an element instead of two. The autocast is entered inside the
engine's forward, since DeepSpeed switches off one that is entered outside and that its own configuration lacks.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
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
from sleeptrain.parallel.zero import limits
from sleeptrain.parallel.zero.flat_optimizer import FlatOptimizer, ModelStage, Partition, WholeOptimizer
from sleeptrain.parallel.zero.matrix_exchange import Shards, Unsharded
from sleeptrain.parallel.zero.mpu import MegatronUnit, stage_group
from sleeptrain.parallel.zero.partitions import (
    group_partitions,
    local_shape,
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
            engine.set_gradient_accumulation_boundary(False)  # a step ends where `step` says so
        check_wide(parameters)
        optimizer.bind(self._partitions(), stage)

    def freeze(self, stage: int) -> None:
        """Begins a stage of `sleeptrain.optim.freezing`: gradients and updates of its frozen parameters are zero."""
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
        """`function(model)`, with the weights in place that ZeRO-3 gathers and without autocast, unless it enters one.

        Under ZeRO-3 a backward must start at a tensor that the function returned, by itself or in a tuple, list or
        dict. The other stages may call the model without this as well.
        """
        return self.deepspeed_engine(function)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a scalar to this step's, any number of times before `step`.

        loss: this data rank's part of the step's loss, which is the sum over data ranks, or a surrogate with its
        gradient. Raises ConfigError for a second backward of a step under ZeRO-3, which would replace the first.
        """
        if self.zero == 3 and self._has_gradients:
            raise ConfigError(
                "parallel.zero=3 takes one backward a step, and this step has several (train.micro_batch, "
                "sleep.bptt_windows); use parallel.zero=1 or 2"
            )
        self._has_gradients = True
        # ZeRO-3 can only average over data ranks; the other stages are configured to sum.
        self.deepspeed_engine.backward(loss * self.mesh.data.size if self.zero == 3 else loss)

    @contextmanager
    def sum_once(self) -> Iterator[None]:
        """Backwards inside keep whole gradients; under ZeRO-2 they are summed over data ranks once, at the end.

        So replicas may differ in their backwards there, as they may under ZeRO-0 and 1, which always sum in `step`. At
        the end every parameter must have a gradient in all of them, or in none. Not for ZeRO-3.
        """
        if self.zero < 2:
            yield
            return
        with self.deepspeed_engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                # DeepSpeed sums at the end come what may: without gradients nobody waits for the others there.
                self.zero_grad()
                raise
        self._summed = True

    def step(self, scale: float, accepts: Callable[[float], bool] | None = None) -> float:
        """Sums the gradients over data ranks, clips them, and updates at `scale` times the peak rates.

        Returns the norm of the raw gradient over all ranks and both optimizers, from before the clipping. Where it is
        not finite, infinity is returned and nothing changes. accepts: told of a finite norm, once, says whether the
        update is made; all processes must say the same.
        """
        # DeepSpeed has the norm before it calls the optimizer, group by group.
        norm = lambda: float(self.deepspeed_engine.optimizer._global_grad_norm)  # noqa: E731
        self.optimizer.accepts = cache(lambda: accepts is None or accepts(norm()))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        if self.zero == 2:
            self._step_summed()
        else:
            self.deepspeed_engine.step()
        self._has_gradients = False
        return float(self.deepspeed_engine.get_global_grad_norm())

    def _step_summed(self) -> None:
        """ZeRO-2: what each backward has summed and cut becomes the step's gradient, unless all was summed at once."""
        engine = self.deepspeed_engine
        if not self._summed:
            with engine.coalesce_grad_reduction():
                pass
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        engine.set_gradient_accumulation_boundary(False)
        self._summed = False

    def zero_grad(self) -> None:
        """Drops the gradients of the backward calls since the last step."""
        self.deepspeed_engine.optimizer.zero_grad()
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
) -> ZeroEngine:
    """The engine of this process's stage; every process of the mesh, made by `Mesh.build`, calls it.

    model: fp32, this process's part of it; the weights are made equal over the data ranks. roles: of each of the
    model's trainable parameters, as a whole one. shards, whole_shapes: how tensor parallel shards form whole
    parameters, and their shapes; needed where there are several tensor ranks.
    Combinations that DeepSpeed would get wrong are refused before (layout_check). Raises LayoutError for a DeepSpeed
    that lays out its partitions otherwise than known.
    """
    parameters = _trainable(model, roles)
    if mesh.tensor.size > 1 and (shards is None or whole_shapes is None):
        raise ValueError("with several tensor ranks `shards` and `whole_shapes` tell how parameters are whole")
    local = {name: tuple(p.shape) for name, p in parameters.items()}
    optimizer = (WholeOptimizer if zero == 0 else FlatOptimizer)(roles, parameters, config)
    for name, p in parameters.items():
        if roles[name].frozen:
            p.register_hook(partial(_unless_frozen, optimizer, roles[name].frozen))
    deepspeed = load_deepspeed()
    engine, *_ = deepspeed.initialize(
        model=_Call(model),
        optimizer=optimizer,
        mpu=MegatronUnit(mesh),
        dist_init_required=False,
        config=_engine_config(zero, config, parameters),
    )
    if zero == 3:
        _keep_gathered(deepspeed, engine.module)
    stage = ModelStage(stage_group(), mesh.tensor.rank, local, whole_shapes or local, shards or Unsharded())
    return ZeroEngine(engine, optimizer, model, parameters, mesh, stage)


def load_deepspeed() -> Any:
    """The deepspeed module, quiet, on the device that torch has, over the torch.distributed that is initialised.

    DeepSpeed asks at its first use which of its C++ parts this machine could compile, and runs compilers to find out.
    On a CPU it would then compile a library for communication over shared memory (minutes). None of them is used here:
    gloo and NCCL communicate, and the optimizers are ours. So it is given the answer.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}  # it can compile nothing
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def check_wide(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError unless every parameter is fp32, decays included."""
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {p.dtype}, but the weights under parallel.zero are fp32; train.precision=bf16 casts them "
                "in the forward pass"
            )


def _unless_frozen(optimizer: FlatOptimizer, stages: tuple[int, ...], gradient: torch.Tensor) -> torch.Tensor:
    """Of a frozen parameter the gradient is zero: DeepSpeed waits for one, and it must not count in the norm."""
    return torch.zeros_like(gradient) if optimizer.frozen_stage in stages else gradient


class _Call(nn.Module):
    """Calls a function with the model from inside a forward, around which ZeRO-3 gathers weights."""

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
        # backward() may be called any number of times; step() is where a step ends. Only where DeepSpeed manages this
        # does it sum the gradients of several backwards at once, so under ZeRO-2 it does, told of the end by us.
        "managed_gradient_accumulation": zero == 2,
        # DeepSpeed's default would clip to 1. Under ZeRO-0 it tells no norm, and our optimizer clips.
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


def _keep_gathered(deepspeed: Any, call: _Call) -> None:
    """Tells ZeRO-3 which parameters to keep from the forward to the step.

    It gathers a module's weights for its backward when the gradient of a tensor that the module returned arrives.
    Mixers also return their state, a value that it does not look into, and the head is applied outside of its module:
    so the head and all that is no weight matrix of an innermost module stay. The bulk of the weights comes and goes.
    """
    head = getattr(call.model, "head_weight", None)
    for module in call.model.modules():
        innermost = not any(True for _ in module.children())
        for parameter in module.parameters(recurse=False):
            if parameter is head or not innermost or len(local_shape(parameter)) != 2:
                deepspeed.zero.register_external_parameter(call, parameter)


def _trainable(model: nn.Module, roles: Mapping[str, ParameterRole]) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in parameters:
        if name not in roles:
            raise ConfigError(f"{name} is trainable but has no role; give it one of {', '.join(KINDS)}")
    check_wide(parameters)
    return parameters
