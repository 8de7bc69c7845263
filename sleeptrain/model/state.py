"""What a model keeps across an eviction boundary: the fast weights of each layer, as a value passed in and returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from sleeptrain.data.batch import PAD


@dataclass(frozen=True)
class Recurrent:
    """The memory of a recurrent mixer.

    S_BHKV: fp32 (fp64 in a fp64 model) fast weights.
    conv_BWD: the last conv_size - 1 inputs of the short convolution; None when the convolution restarts at each window.
    """

    S_BHKV: torch.Tensor
    conv_BWD: torch.Tensor | None = None


@dataclass(frozen=True)
class Retained:
    """The window that sliding eviction keeps in an attention layer's cache: keys before rotation, values, documents.

    k_BLGD, v_BLGD: the keys and values of the last pass over the window before. documents_BL: int64, PAD where empty.
    """

    k_BLGD: torch.Tensor
    v_BLGD: torch.Tensor
    documents_BL: torch.Tensor


@dataclass(frozen=True)
class WindowKV:
    """The keys and values of a window in progress in an attention layer: buffers with a slot for each of its L tokens.

    k_BCGD, v_BCGD: C = L, the keys rotated to their positions in the window; under sliding eviction C = 2L, before them
    those that the window before has left. A pass that goes on with the window writes into them in place: whoever
    wants to keep a value takes its `rows`, which are copies.
    """

    k_BCGD: torch.Tensor
    v_BCGD: torch.Tensor


LayerState = Recurrent | Retained | WindowKV | None
KINDS = (Recurrent, Retained, WindowKV)


@dataclass(frozen=True)
class Boundary:
    """What crosses an eviction boundary besides S.

    sliding_window: None under hard eviction (the cache is cleared); else each token attends to the last so many tokens,
    whatever window they are in. carry_conv: the short convolutions of a wake pass go on where the window before ended.
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
    """`new` in the rows `rows_R` of `old`; where there was no state before, the other rows are empty."""
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
    """Memory that holds nothing: zeros, and PAD as the document of retained tokens."""
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
        """The same value with the states of layers [first, first + len(states)) exchanged."""
        return FastWeights((*self.layers[:first], *states, *self.layers[first + len(states) :]))

    def detach(self) -> FastWeights:
        return FastWeights(tuple(_map(s, torch.Tensor.detach) for s in self.layers))

    def to(self, device: torch.device | str) -> FastWeights:
        return FastWeights(tuple(_map(s, lambda t: t.to(device)) for s in self.layers))

    def rows(self, rows_R: torch.Tensor) -> FastWeights:
        """The states of the rows with these indices (int64 [R])."""
        return FastWeights(tuple(_map(s, lambda t: t.index_select(0, rows_R)) for s in self.layers))

    def put_rows(self, rows_R: torch.Tensor, new: FastWeights, num_rows: int) -> FastWeights:
        """These rows of `num_rows` exchanged for those of `new` (R rows)."""
        pairs = zip(self.layers, new.layers, strict=True)
        return FastWeights(tuple(_put(a, rows_R, b, num_rows) for a, b in pairs))

    def keep_rows(self, keep_B: torch.Tensor) -> FastWeights:
        """Empty memory in the rows where `keep_B` (bool) is False: a new document begins there."""

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
            own = {key.split(".", 1)[1]: t for key, t in named.items() if key.split(".", 1)[0] == str(index)}
            layers.append(_of_fields(own) if own else None)
        return FastWeights(tuple(layers))


def _of_fields(own: Mapping[str, torch.Tensor]) -> LayerState:
    """The state whose fields have these names; Recurrent may lack its tail."""
    kind: Any = next(kind for kind in KINDS if fields(kind)[0].name in own)
    return kind(**own)
