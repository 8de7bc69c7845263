"""The state that crosses an eviction boundary: the fast weights of each layer, a value passed in and returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from sleeptrain.data.batch import PAD


@dataclass(frozen=True)
class Recurrent:
    """The memory of a recurrent mixer.

    S_BHKV: the fast weights, fp32 (fp64 in a fp64 model).
    conv_BWD: the last conv_size - 1 inputs of the short convolution; None if the convolution restarts at each window.
    """

    S_BHKV: torch.Tensor
    conv_BWD: torch.Tensor | None = None


@dataclass(frozen=True)
class Retained:
    """The window that sliding eviction keeps in an attention layer's cache: keys before rotation, values, documents.

    k_BLGD, v_BLGD: the keys and values of the last pass over the previous window.
    documents_BL: int64 ids, PAD where empty.
    """

    k_BLGD: torch.Tensor
    v_BLGD: torch.Tensor
    documents_BL: torch.Tensor


@dataclass(frozen=True)
class WindowKV:
    """The keys and values of a window in progress in an attention layer: buffers with a slot for each of its L tokens.

    k_BCGD, v_BCGD: C = L; the keys are rotated to their positions in the window. Under sliding eviction C = 2L: the
        slots of the previous window come first.

    A pass that continues the window writes into the buffers in place. To keep a value, copy it with `rows`.
    """

    k_BCGD: torch.Tensor
    v_BCGD: torch.Tensor


LayerState = Recurrent | Retained | WindowKV | None
KINDS = (Recurrent, Retained, WindowKV)


@dataclass(frozen=True)
class Boundary:
    """The settings of an eviction boundary: the values that cross it besides S.

    sliding_window: how many last tokens each token attends to, in any window; None: hard eviction clears the cache.
    carry_conv: in a wake pass the short convolutions continue from the end of the previous window.
    """

    sliding_window: int | None = None
    carry_conv: bool = False


HARD = Boundary()


def _map(state: LayerState, function: Callable[[torch.Tensor], torch.Tensor]) -> LayerState:
    if state is None:
        return None
    tensors: list[Any] = [getattr(state, f.name) for f in fields(state)]
    changed: list[Any] = [None if t is None else function(t) for t in tensors]
    return type(state)(*changed)


def _put(old: LayerState, rows_R: torch.Tensor, new: LayerState, num_rows: int) -> LayerState:
    """`old` with `new` in the rows `rows_R`. Without an old state the other rows are empty."""
    if new is None:
        return old
    merged: list[Any] = []
    for field in fields(new):
        a, b = getattr(old, field.name, None), getattr(new, field.name)
        if a is None and b is not None:
            a = empty_rows(b, num_rows)
        merged.append(a if a is None or b is None else a.index_copy(0, rows_R, b))
    return type(new)(*merged)


def empty_rows(like: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Empty memory of `num_rows` rows: zeros, and PAD as the document of retained tokens."""
    return like.new_full((num_rows, *like.shape[1:]), 0 if like.is_floating_point() else PAD)


@dataclass(frozen=True)
class FastWeights:
    """The state of every layer for B rows; a layer without memory holds None.

    Immutable: each method returns a new value. Gradients flow through it unless `detach` is called.
    """

    layers: tuple[LayerState, ...]

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    def replace(self, first: int, states: Sequence[LayerState]) -> FastWeights:
        """A copy with `states` in the layers [first, first + len(states))."""
        return FastWeights((*self.layers[:first], *states, *self.layers[first + len(states) :]))

    def detach(self, layers: range | None = None) -> FastWeights:
        """The same values without gradients in these layers; None: in all."""
        return FastWeights(
            tuple(
                _map(s, torch.Tensor.detach) if layers is None or layer in layers else s
                for layer, s in enumerate(self.layers)
            )
        )

    def to(self, device: torch.device | str) -> FastWeights:
        return FastWeights(tuple(_map(s, lambda t: t.to(device)) for s in self.layers))

    def rows(self, rows_R: torch.Tensor) -> FastWeights:
        """A copy of the states of these rows (int64 indices [R])."""
        return FastWeights(tuple(_map(s, lambda t: t.index_select(0, rows_R)) for s in self.layers))

    def put_rows(self, rows_R: torch.Tensor, new: FastWeights, num_rows: int) -> FastWeights:
        """A copy of `num_rows` rows, with the R rows of `new` at the indices `rows_R`."""
        pairs = zip(self.layers, new.layers, strict=True)
        return FastWeights(tuple(_put(a, rows_R, b, num_rows) for a, b in pairs))

    def keep_rows(self, keep_B: torch.Tensor) -> FastWeights:
        """A copy with empty memory in the rows where `keep_B` (bool) is False, because a new document begins there."""

        def keep(t: torch.Tensor) -> torch.Tensor:
            return torch.where(keep_B.view(-1, *[1] * (t.dim() - 1)), t, empty_rows(t, t.shape[0]))

        return FastWeights(tuple(_map(s, keep) for s in self.layers))

    def to_state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by `<layer>.<field>`, for a checkpoint."""
        named: dict[str, torch.Tensor] = {}
        for index, state in enumerate(self.layers):
            if state is not None:
                for field in fields(state):
                    tensor = getattr(state, field.name)
                    if tensor is not None:
                        named[f"{index}.{field.name}"] = tensor
        return named

    @staticmethod
    def from_state_dict(named: Mapping[str, torch.Tensor], num_layers: int) -> FastWeights:
        layers: list[LayerState] = []
        for index in range(num_layers):
            tensors = {key.split(".", 1)[1]: t for key, t in named.items() if key.split(".", 1)[0] == str(index)}
            layers.append(_of_fields(tensors) if tensors else None)
        return FastWeights(tuple(layers))


def _of_fields(tensors: Mapping[str, torch.Tensor]) -> LayerState:
    """The state whose fields have these names; Recurrent may lack its tail."""
    kind: Any = next(kind for kind in KINDS if fields(kind)[0].name in tensors)
    return kind(**tensors)
