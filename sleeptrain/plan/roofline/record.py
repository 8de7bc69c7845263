"""A record of the operators that torch runs: what each reads and writes, on fake tensors of any size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleeptrain.ops.row_stacks import STACKED, keeps_rows
from sleeptrain.plan.roofline import kinds
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.opaque import OPAQUE, Documents, Opaque
from sleeptrain.plan.roofline.waits import makes_the_host_wait

LATE_PRODUCT = "add_late_product"  # of rows that are kept; it reads and writes its part of a total
NARROW = 512  # a product with a dimension below it reaches a smaller share of the peak


@dataclass(frozen=True)
class Use:
    """A tensor that an operator reads or writes.

    storage: number of its memory in the record. version: how often that memory was written before, or with this.
    offset: of its first element. bytes: of its distinct elements, as many as the operator touches.
    """

    storage: int
    version: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class Call:
    """A call of an operator that launches kernels.

    name: of its packet, without the underscore of work in place. kind: of its work. kernels: that it launches, or its
    part of one.
    flops: of a product, an attention or a recurrence; a multiply-add is two.
    h200: seconds on an H200 of an operator with a published time, else 0.
    elements: that its kernel iterates over.
    fusible: a compiler can put it into one kernel with others.
    reduces: `rows`: it sums over the last dimension; `all`: over others; empty: it reduces nothing.
    narrow: a product with a dimension below `NARROW`. wide: a product of fp32 matrices.
    identity: equal for calls that compute the same; None: unlike any other.
    backward: it ran in the backward.
    """

    name: str
    kind: Kind
    kernels: float
    flops: int
    h200: float
    elements: int
    reads: tuple[Use, ...]
    writes: tuple[Use, ...]
    fusible: bool
    reduces: str
    narrow: bool
    wide: bool
    identity: Hashable
    backward: bool


class Recorder(TorchDispatchMode):
    """While entered, records the calls of operators.

    calls: in the order of execution. dispatched: operators that the host called, views included, by `Call.backward`.
    waits: names of operators for which the host would wait for a GPU.
    """

    def __init__(self, head: bool = False, documents: Documents | None = None, rows_at_once: int | None = None):
        """head: the work is that of head and loss. documents: into which rows are cut; None: they are not.

        rows_at_once: that are multiplied together where rows of products are kept; None: as many as are kept.
        """
        super().__init__()
        self.calls: list[Call] = []
        self.dispatched = [0, 0]
        self.waits: list[str] = []
        self.backward = False
        self._head, self._rows_at_once = head, rows_at_once or STACKED
        self._documents = documents or Documents()
        self._numbers: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._alive: list[torch.UntypedStorage] = []  # so that no address is used twice
        self._sums: frozenset[int] = frozenset()

    def begin_backward(self, gradients: Sequence[torch.Tensor]) -> None:
        """Say that the backward begins. gradients: the tensors to which it adds the gradients of weights."""
        self.backward, self._sums = True, self.storages(gradients)

    def storages(self, tensors: Sequence[torch.Tensor]) -> frozenset[int]:
        """The numbers of these tensors' storages."""
        return frozenset(self._number(t) for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if makes_the_host_wait(name, args, kwargs):
            self.waits.append(name)
        result = func(*args, **kwargs)
        if func.namespace != "prim" and name != "promote_types":
            self.dispatched[self.backward] += 1
            if name == "add_wide_products":
                self._add_products(*args)
            elif name not in kinds.FREE and not func.is_view:
                self._add(func, name, args, kwargs, result)
        return result

    def _add(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        targets = _targets(func, args, kwargs)
        outputs = _tensors(result) or targets
        if not outputs:
            return
        plain, arguments = name.removesuffix("_"), _tensors((args, kwargs))
        inputs = [t for t in arguments if not any(t is x for x in targets)]
        read = "out" in func._overloadname and all(any(t is x for x in _tensors(args)) for t in targets)
        if targets and (read or not (plain in ("copy", "zero", "fill") or "out" in func._overloadname)):
            inputs = [*targets, *inputs]  # work in place reads what it changes
        opaque = OPAQUE.get(f"{func.namespace}::{name}")
        known = None if opaque is None else opaque(args, kwargs, self._documents)
        identity = None if targets else (str(func), self._signature((args, kwargs)))
        rows = max(map(_bytes, arguments[1:])) if plain in kinds.WRITE_ROWS else None
        reads = [self._use(t) for t in _touched(plain in kinds.READ_ROWS, inputs, outputs)]
        if rows is not None:  # of the table, too, it reads as much as it changes
            reads[0] = replace(reads[0], bytes=rows)
        written = targets or outputs
        for t in written:
            self._versions[self._number(t)] = self._versions.get(self._number(t), 0) + 1
        writes = tuple(self._use(t, rows) for t in written)
        kind = self._kind(plain, inputs, outputs, writes, known)
        product = plain in kinds.PRODUCTS
        iterated = inputs if plain in kinds.REDUCTIONS else outputs
        self.calls.append(
            Call(
                plain, kind, kinds.KERNELS.get(plain, 1) if known is None else known.kernels,
                known.flops if known else 2 * outputs[0].numel() * inputs[-2].shape[-1] if product else 0,
                0.0 if known is None else known.h200, max(t.numel() for t in iterated), tuple(reads), writes,
                known is None and kind in (Kind.ELEMENTWISE, Kind.CAST) and _fusible(func, plain),
                _reduces(plain, inputs, outputs), product and _smallest(inputs) < NARROW,
                product and inputs[-1].dtype == torch.float32, identity, self.backward,
            )
        )  # fmt: skip

    def _add_products(self, totals: Sequence[torch.Tensor], factors: Sequence[torch.Tensor], b: torch.Tensor) -> None:
        """Add the products that `add_wide_products` adds to totals; of some it copies rows and computes them later."""
        late = keeps_rows(totals, b)
        if any(late):
            self._copy_rows([*(a for a, is_late in zip(factors, late, strict=True) if is_late), b])
        kind = Kind.HEAD if self._head else Kind.PRODUCT
        for total, a, is_late in zip(totals, factors, late, strict=True):
            share = len(b) / self._rows_at_once if is_late else 1  # of a product of many rows
            size = int(_bytes(total) * share)
            reads = (self._use(total, size), self._use(a), self._use(b))
            self._versions[self._number(total)] = self._versions.get(self._number(total), 0) + 1
            call = Call(
                LATE_PRODUCT if is_late else "add_wide_product", kind, share, 2 * total.numel() * len(b), 0.0,
                total.numel(), reads,
                (self._use(total, size),), False, "", _smallest((a, b)) < NARROW, b.dtype == torch.float32, None,
                self.backward,
            )  # fmt: skip
            self.calls.append(call)

    def _copy_rows(self, factors: Sequence[torch.Tensor]) -> None:
        """Add the copy of factors whose products are computed later: one kernel."""
        uses = tuple(self._use(t) for t in factors)
        elements = sum(t.numel() for t in factors)
        self.calls.append(
            Call("stack_rows", Kind.PRODUCT, 1, 0, 0.0, elements, uses, uses, False, "", False, False, None, True)
        )
        self.dispatched[1] += 1 + len(factors)  # slices and the copy

    def _kind(
        self,
        name: str,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        writes: Sequence[Use],
        known: Opaque | None,
    ) -> Kind:
        if known is not None:
            return known.kind
        if name in kinds.PRODUCTS:
            return Kind.HEAD if self._head else Kind.PRODUCT
        if any(w.storage in self._sums for w in writes):
            return Kind.SUM
        if self._head:
            return Kind.LOSS
        if name in kinds.EMBEDDINGS:
            return Kind.EMBEDDING
        cast = name in kinds.CASTS and inputs and inputs[-1].dtype != outputs[0].dtype
        return Kind.CAST if cast else Kind.ELEMENTWISE

    def _number(self, t: torch.Tensor) -> int:
        storage = t.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self._numbers)
            self._alive.append(storage)
        return self._numbers[storage._cdata]

    def _use(self, t: torch.Tensor, size: int | None = None) -> Use:
        number = self._number(t)
        return Use(number, self._versions.get(number, 0), int(t.storage_offset()), _bytes(t) if size is None else size)

    def _signature(self, values: Any) -> Hashable:
        return tuple(
            (*self._place(t), t.dtype, t.shape, t.stride()) if isinstance(t, torch.Tensor) else str(t)
            for t in tree_leaves(values)
        )

    def _place(self, t: torch.Tensor) -> tuple[int, int, int]:
        number = self._number(t)
        return number, self._versions.get(number, 0), int(t.storage_offset())


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


def _targets(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The arguments that the operator writes."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs[argument.name] if argument.name in kwargs else args[position]
            found += _tensors(value)
    return found


def _bytes(t: torch.Tensor) -> int:
    """Bytes of the distinct elements: a dimension that was expanded has one."""
    return prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.itemsize


def _touched(rows: bool, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The tensors that are read; of a table that is looked up, as much as the result has."""
    return [*outputs[:1], *inputs[1:]] if rows else inputs


def _smallest(inputs: Sequence[torch.Tensor]) -> int:
    a, b = inputs[-2:]
    return min(a.shape[-2], b.shape[-1])


def _fusible(func: Any, name: str) -> bool:
    named = name in kinds.ELEMENTWISE or name in kinds.REDUCTIONS or name in kinds.MADE
    return named or torch.Tag.pointwise in func.tags


def _reduces(name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> str:
    if name not in kinds.REDUCTIONS:
        return ""
    before, after = inputs[0].shape, outputs[0].shape
    rows = prod(before[:-1]) == outputs[0].numel() and (before[:-1] == after or before[:-1] == after[:-1])
    return "rows" if rows else "all"
