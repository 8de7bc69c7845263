"""`MixerSpec`: all that the rest of the stack knows about a mixer. Each mixer's file defines its spec.

The optimizers, tensor parallelism, the FLOP counter, `sleeptrain plan` and the pipeline read a mixer only through its
spec. A new mixer is therefore one file, one dataclass of settings and one line of `sleeptrain.config.mixers`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sleeptrain.config.mixers import mixer_settings
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.model.decay import parameter_generator, random_decay
from sleeptrain.model.shards import Sharding, TensorRank

WIDE = 4  # bytes of an element in fp32

Rows = slice | torch.Tensor  # rows of a matrix: a slice or an int64 index


@dataclass(frozen=True)
class MixerFlops:
    """Forward FLOPs of a mixer. A multiply-add is two.

    state: for one token, to compute the state.
    features: for one token, to compute the output features in addition.
    pair: for one pair of tokens that attend.
    """

    state: int
    features: int
    pair: int = 0


@dataclass(frozen=True)
class Precision:
    """The facts about precision and kernels that decide how many bytes autograd saves for a mixer.

    narrow: bytes of an element of products and attention (2 under `train.precision=bf16`, else 4).
    kernels: recurrences, convolutions, norms and gates run in flash-linear-attention and attention reads documents by
        their bounds where it can, as on a GPU; False: in PyTorch, with masks.
    residual: bytes of an element of the features between blocks.
    """

    narrow: int
    kernels: bool
    residual: int = WIDE

    def inputs(self, dim: int, count: int) -> int:
        """Bytes per token of the inputs of `count` linear layers that read the same features [..., dim].

        Each layer makes its own narrow copy of wide features; features of one dtype are one tensor for all.
        """
        return self.narrow * dim * (count if self.narrow < self.residual else 1)

    def normed(self, element: int) -> int:
        """Bytes per element that a norm saves of an input whose elements have `element`: PyTorch makes a wide copy."""
        return element if self.kernels else WIDE


@dataclass(frozen=True)
class Draw:
    """Draws one parameter of the whole model, by a generator that depends only on seed and name."""

    name: str
    shape: tuple[int, ...]
    seed: int

    def normal(self, std: float) -> torch.Tensor:
        return torch.empty(self.shape).normal_(0.0, std, generator=parameter_generator(self.seed, self.name))

    def uniform(self, bound: float) -> torch.Tensor:
        """Uniform in [-bound, bound)."""
        return torch.empty(self.shape).uniform_(-bound, bound, generator=parameter_generator(self.seed, self.name))

    def decay(self) -> torch.Tensor:
        """Mamba's A_log or dt_bias, by the parameter's name (`random_decay`)."""
        leaf = self.name.rsplit(".", 1)[-1]
        generator = parameter_generator(self.seed, f"{self.name.removesuffix(leaf)}A_log")
        return random_decay(self.shape, generator)[leaf]


class MixerSpec(ABC):
    """The facts about a mixer under a model's settings.

    module: the module class, built from a ModelConfig. Its forward takes (x_BTD, state, layout, boundary, state_only)
        and returns (y_BTD or None, state), as `GatedDeltaNet.forward` does.
    settings_class: the dataclass of the mixer's settings.
    recurrent: the mixer keeps a state S.
    state_layers: the linear layers that the state needs, in the order of their calls.
    feature_layers: the further linear layers that the features need, in the same order; the last one ends the mixer.
    not_maps: matrices that AdamW updates, since they map features to one number per head.
    not_matrices: parameters of two dimensions that are no matrices.
    """

    module: ClassVar[type[nn.Module]]
    settings_class: ClassVar[type]
    recurrent: ClassVar[bool] = True
    state_layers: ClassVar[tuple[str, ...]]
    feature_layers: ClassVar[tuple[str, ...]]
    not_maps: ClassVar[tuple[str, ...]] = ()
    not_matrices: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: ModelConfig, kind: str):
        self.model, self.kind = model, kind
        self.settings: Any = mixer_settings(model, kind)

    @property
    def ends(self) -> str:
        """The linear layer that ends the mixer."""
        return self.feature_layers[-1]

    # The state.

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(heads, K, V) of S; zeros if the mixer keeps no S."""
        return (0, 0, 0)

    @property
    def conv_pieces(self) -> tuple[int, ...]:
        """The channels of the short convolution, in the pieces that tensor ranks cut; empty without a convolution."""
        return ()

    @property
    def conv_size(self) -> int:
        """Taps of the short convolution; 1 without one."""
        return 1

    def carried_bytes(self, narrow: int, sliding_window: int, carry_conv: bool) -> int:
        """Bytes of one row's state across a boundary, fp32: S, and with `carry_conv` the convolution's tail."""
        tail = (self.conv_size - 1) * sum(self.conv_pieces) if carry_conv else 0
        return WIDE * (math.prod(self.state_shape) + tail)

    # Initial values and the optimizer.

    def initial_weight(self, name: str, draw: Draw) -> torch.Tensor | None:
        """The initial values of a parameter of the mixer, fp32; None: it keeps the values that it is built with.

        By default weights are normal with standard deviation `model.init_std`, divided by sqrt(2 * layers) in the
        matrix that ends the mixer; biases are zero; norms stay as built. Raises ConfigError for any other parameter,
        which the mixer's spec must initialise.
        """
        if "norm" in name:
            return None
        if name.endswith("bias"):
            return torch.zeros(draw.shape)
        if not name.endswith(".weight") or len(draw.shape) != 2:
            raise ConfigError(
                f"model.layers: the spec of mixer '{self.kind}' gives no initial values of {name} {list(draw.shape)}"
            )
        ends = name == f"{self.ends}.weight"
        return draw.normal(self.model.init_std / (math.sqrt(2 * len(self.model.layers)) if ends else 1))

    def fused_rows(self) -> Mapping[str, tuple[Rows, ...]]:
        """For each parameter that holds several matrices: their rows. Muon orthogonalises each matrix by itself."""
        return {}

    # Tensor ranks.

    @abstractmethod
    def sharding(self) -> dict[str, Sharding]:
        """How each parameter of the mixer is sharded over tensor ranks, by its name in the mixer."""

    @abstractmethod
    def cut(self, size: int) -> Any:
        """The mixer's settings for one of `size` tensor ranks."""

    @abstractmethod
    def obstacles(self, size: int) -> Iterator[str]:
        """The settings that prevent a cut over `size` tensor ranks, each as `<setting> (<value>)`."""

    def rank_module(self, local: ModelConfig, place: TensorRank) -> nn.Module | None:
        """The module of one tensor rank, whose settings are `local`; None: `module` as it is, built from `local`.

        A mixer that lets ranks share heads, beyond those of a linear layer (`Sharding.heads`), has another module here.
        """
        return None

    def exchanged(self, size: int) -> int:
        """Elements per token that `size` tensor ranks exchange in the forward, in the narrow dtype."""
        return sum(rule.exchanged(size) for rule in self.sharding().values())

    @property
    def partial_gradients(self) -> int:
        """Elements of the parameters whose gradients are sums over tensor ranks (`Sharding.partial_gradient`)."""
        return 0

    @property
    def summed_squares(self) -> int:
        """Numbers per token that tensor ranks sum in fp32, for a norm over channels that are cut."""
        return 0

    # Costs.

    @abstractmethod
    def flops(self) -> MixerFlops:
        """The FLOPs of the mixer without convolutions, norms and other elementwise work, as is usual for MFU."""

    def reach(self, tokens: int) -> int:
        """How many of the last `tokens` tokens a token attends to, itself included."""
        return tokens

    @abstractmethod
    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        """Bytes per token of one row that autograd saves for the mixer's backward, in a window of `length` tokens.

        The spec's settings are those of one tensor rank (`cut`). state_only: nobody reads the features.
        """

    def kept_bytes(self, state_only: bool, precision: Precision) -> int:
        """Bytes per token of one row of the results that `sleep.recompute=selective` keeps besides linear layers'."""
        return 0

    def saved_mask_bytes(self, length: int, precision: Precision) -> int:
        """Bytes of the mixer's mask that autograd saves, once for all rows."""
        return 0


def consecutive_rows(*sizes: int) -> tuple[Rows, ...]:
    """The rows of matrices of these sizes that lie one below the other."""
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


def uneven(section: str, settings: Mapping[str, int], size: int) -> Iterator[str]:
    """The settings that `size` does not divide, as `MixerSpec.obstacles` names them."""
    yield from (f"model.{section}.{name} ({value})" for name, value in settings.items() if value % size)


def shareable(num_heads: int, head_dim: int, size: int) -> bool:
    """True if each rank gets whole heads, or if ranks that share a head store its rows in equal parts."""
    return num_heads % size == 0 or (size % num_heads == 0 and num_heads * head_dim % size == 0)
