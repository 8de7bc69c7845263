"""A real step on gloo ranks, which counts everything that a plan predicts."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleeptrain.config.schema import Config
from sleeptrain.distributed.launch import join
from sleeptrain.parallel.pipeline.head import HeadMicroBatch
from sleeptrain.parallel.pipeline.mailbox import Mailbox
from sleeptrain.parallel.pipeline.micro_batch import StageMicroBatch
from sleeptrain.plan.workload import typical_batch
from sleeptrain.sleep.curriculum import stage_shape
from sleeptrain.sleep.totals import StepFacts, exchange_results
from sleeptrain.train.engine import build_engine
from sleeptrain.watch.progress import Progress


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """The bytes of the distinct storages of the tensors."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(held.values())


def size(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


# The bytes of each collective: of the reduced tensor, or of the full tensor that is gathered or scattered.
PAYLOADS: dict[str, tuple[str, Callable[[Any], int]]] = {
    "all_reduce": ("all_reduce", lambda a: size(a["tensor"])),
    "all_gather_into_tensor": ("all_gather", lambda a: size(a["output_tensor"])),
    "all_gather": ("all_gather", lambda a: sum(map(size, a["tensor_list"]))),
    "reduce_scatter_tensor": ("reduce_scatter", lambda a: size(a["input"])),
    "reduce_scatter_single": ("reduce_scatter", lambda a: size(a["input"])),
}


@contextmanager
def counted(payload: Counter[str], group: dist.ProcessGroup) -> Iterator[None]:
    """Count collectives of this group, and all that all-to-alls send to others."""
    originals = [(dist, name, getattr(dist, name)) for name in (*PAYLOADS, "all_to_all_single")]

    def wrap(function: Any) -> Any:
        name, signature = function.__name__, inspect.signature(function)

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options).arguments
            if name == "all_to_all_single":
                splits = list(bound["input_split_sizes"])
                splits.pop(dist.get_rank(bound["group"]))
                payload["exchange"] += sum(splits) * bound["input"].element_size()
            elif group is not None and bound.get("group") is group:
                kind, measure = PAYLOADS[name]
                payload[kind] += measure(bound)
            return function(*args, **options)

        return call

    try:
        for module, name, function in originals:
            setattr(module, name, wrap(function))
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


class Sent(TorchDispatchMode):
    """Counts the collectives of a group that run: a rerun may take the results of its forward instead."""

    KINDS: ClassVar[dict[str, tuple[str, int, Callable[[Any], int]]]] = {
        "c10d::allreduce_": ("all_reduce", 1, lambda args: sum(map(size, args[0]))),
        "c10d::_allgather_base_": ("all_gather", 2, lambda args: size(args[0])),
        "c10d::_reduce_scatter_base_": ("reduce_scatter", 2, lambda args: size(args[1])),
        "_c10d_functional::all_reduce": ("all_reduce", 2, lambda args: size(args[0])),
        "_c10d_functional::all_gather_into_tensor": ("all_gather", 2, lambda args: size(args[0]) * args[1]),
        "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 3, lambda args: size(args[0])),
    }

    def __init__(self, group: dist.ProcessGroup | None):
        super().__init__()
        self.name, self.bytes = None if group is None else group.group_name, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in self.KINDS:
            kind, place, measure = self.KINDS[func.name()]
            group = args[place]
            name = group if isinstance(group, str) else dist.ProcessGroup.unbox(group).group_name
            if name == self.name:
                self.bytes[kind] += measure(args)
        return func(*args, **(kwargs or {}))


class Gathers(TorchDispatchMode):
    """Counts the gathers of DeepSpeed over a group: it looks up torch's function before anybody can wrap it."""

    def __init__(self, group: dist.ProcessGroup | None):
        super().__init__()
        self.name, self.bytes = None if group is None else group.group_name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gathers = func is torch.ops.c10d._allgather_base_.default
        if gathers and dist.ProcessGroup.unbox(args[2]).group_name == self.name:
            self.bytes += size(args[0])
        return func(*args, **(kwargs or {}))


class Watch:
    """The bytes that stages hold and mailboxes send at any moment of a step."""

    def __init__(self, monkey: Any):
        self.sequences: list[StageMicroBatch] = []
        self.peak, self.sent = 0, Counter[int]()
        made, forward, backward, send = (
            StageMicroBatch.__init__,
            StageMicroBatch.forward,
            StageMicroBatch.backward,
            Mailbox.send,
        )

        def init(sequence: StageMicroBatch, *args: Any, **options: Any) -> None:
            made(sequence, *args, **options)
            self.sequences.append(sequence)

        def watched(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                result = function(*args, **options)
                self.peak = max(self.peak, nbytes(self._held()))
                return result

            return call

        def sends(mailbox: Mailbox, message: torch.Tensor, peer: int, *more: Any) -> None:
            self.sent[peer] += size(message)
            send(mailbox, message, peer, *more)

        monkey.setattr(HeadMicroBatch, "forward", watched(HeadMicroBatch.forward))
        monkey.setattr(HeadMicroBatch, "backward", watched(HeadMicroBatch.backward))
        monkey.setattr(StageMicroBatch, "__init__", init)
        monkey.setattr(StageMicroBatch, "forward", watched(forward))
        monkey.setattr(StageMicroBatch, "backward", watched(backward))
        monkey.setattr(Mailbox, "send", sends)

    def _held(self) -> Iterator[torch.Tensor]:
        for sequence in self.sequences:
            boundary = () if sequence._boundary is None else (sequence._boundary[1],)
            yield from (t for t in tree_leaves((sequence.state, boundary)) if isinstance(t, torch.Tensor))
            for kept in sequence._saved.values():
                yield from (part.features_RLD for part in kept.entry)
                states = (kept.state, kept.boundary_state)
                yield from (t for t in tree_leaves(states) if isinstance(t, torch.Tensor))
            if sequence.head is not None:
                yield from (t for t in tree_leaves(sequence.head._kept) if isinstance(t, torch.Tensor))


def measure(config: Config, monkey: Any) -> dict[str, Any]:
    """Measure the second step of one of several ranks; it begins with the memory of the first."""
    world = join(config)
    engine = build_engine(config, world, Progress())
    zero, shape = engine._zero, stage_shape(config, 0)
    batch = typical_batch(config, shape.batch // world.mesh.data.size)
    carried = None
    # ZeRO-3 watches two steps before it knows what a step uses.
    for _ in range(2 if config.parallel.zero == 3 else int(bool(batch.continues_B.any()))):
        carried = engine.forward_backward(batch, shape, carried).state
        engine.step(1.0)
    carried = carried if bool(batch.continues_B.any()) else None
    complete_bytes, complete = [0], engine._complete_gradients

    def completed() -> None:
        """Where gradients are summed once, at the end of a step, each rank keeps full ones until then."""
        complete()
        complete_bytes.append(nbytes(p.grad for p in zero.parameters.values()) if zero._flat is None else 0)

    monkey.setattr(engine, "_complete_gradients", completed)
    watch, tensor, data, copies = Watch(monkey), Sent(world.mesh.tensor.group), Counter[str](), Counter[str]()
    gathers = Gathers(world.mesh.shard.group)
    with tensor, counted(data, world.mesh.shard.group), gathers:
        part = engine.forward_backward(batch, shape, carried)
    result, _, _ = exchange_results(world, part, 0.0, StepFacts())
    gradients = max(*complete_bytes, nbytes(_gradients(zero)))
    with counted(data, world.mesh.shard.group), counted(copies, world.mesh.copies.group), gathers:
        engine.step(1.0)
    optimizer = zero.optimizer
    masters = [t for p in optimizer.partitions for t in p.tensors]
    return {
        "stage": world.mesh.pipeline.rank,
        "weights": _weights(zero),
        "master": 0 if zero.zero == 0 else nbytes(masters),
        "gradients": gradients,
        "optimizer": nbytes(t for s in optimizer.state.values() for t in s.values() if t.dim()),
        "flops": result.flops * world.size,
        "rounds": result.num_rounds,
        "tensor": dict(tensor.bytes),
        "reduce": data["reduce_scatter" if zero.zero == 1 else "all_reduce"],
        "gather": gathers.bytes,
        "copies": copies["all_reduce"],
        "exchange": data["exchange"],
        "boundary": watch.peak,
        "sent": dict(watch.sent),
    }


def _weights(zero: Any) -> int:
    """The weights that the model computes with; under ZeRO-3 the parts that are kept and the gathered tensors."""
    parameters = list(zero.parameters.values())
    parts = nbytes(p.ds_tensor for p in parameters) if zero.zero == 3 else 0
    return parts + nbytes(parameters) if zero.zero < 3 else parts + sum(4 * p.ds_numel for p in parameters)


def _gradients(zero: Any) -> list[torch.Tensor | None]:
    wrapped = zero.deepspeed_engine.optimizer
    if zero.zero == 2:
        return [t for tensors in wrapped.all_grad_tensors.values() for t in tensors or ()]
    if zero.zero == 3:
        return [t for tensors in wrapped.averaged_gradients.values() for t in tensors]
    return [p.grad for p in zero.parameters.values()] if zero._flat is None else zero._flat.tensors
