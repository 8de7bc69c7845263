"""What the rest of the stack knows about a mixer: one `MixerSpec` a mixer, in the mixer's own file.

The optimizers, tensor parallelism, the FLOP counter, `sleeptrain plan` and the pipeline read it there and nowhere else,
so that a new mixer is one file, one dataclass of settings and one line of `sleeptrain.config.mixers`.
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
from sleeptrain.model.shards import Sharding

WIDE = 4  # bytes of an element in fp32

Rows = slice | torch.Tensor  # rows of a matrix: a slice or an int64 index


@dataclass(frozen=True)
class MixerFlops:
    """Forward FLOPs of a mixer for one token: to leave its state, and to give its features besides; and for a pair of
    tokens that attend. A multiply-add is two."""

    state: int
    features: int
    pair: int = 0


@dataclass(frozen=True)
class Precision:
    """What decides how much autograd keeps of a mixer.

    narrow: bytes of an element that autocast makes narrow (2 in bf16, else 4). kernels: the recurrences are those of
    flash-linear-attention, as on a GPU, else PyTorch's.
    """

    narrow: int
    kernels: bool

    def inputs(self, dim: int, count: int) -> int:
        """Bytes a token of the inputs of `count` linear layers that read the same features: autocast makes each of them
        a narrow copy of its own, in fp32 all share one."""
        return self.narrow * dim * (count if self.narrow < WIDE else 1)


@dataclass(frozen=True)
class Draw:
    """The initial values of one parameter of the whole model, from a generator that depends on seed and name alone."""

    name: str
    shape: tuple[int, ...]
    seed: int

    def normal(self, std: float) -> torch.Tensor:
        return torch.empty(self.shape).normal_(0.0, std, generator=parameter_generator(self.seed, self.name))

    def uniform(self, bound: float) -> torch.Tensor:
        """Between -bound and bound."""
        return torch.empty(self.shape).uniform_(-bound, bound, generator=parameter_generator(self.seed, self.name))

    def decay(self) -> torch.Tensor:
        """Mamba's A_log or dt_bias, whichever this is (`random_decay`)."""
        leaf = self.name.rsplit(".", 1)[-1]
        generator = parameter_generator(self.seed, f"{self.name.removesuffix(leaf)}A_log")
        return random_decay(self.shape, generator)[leaf]


class MixerSpec(ABC):
    """A mixer's facts under a model's settings.

    module: built from a ModelConfig; its forward takes (x_BTD, state, layout, boundary, state_only) and returns
    (y_BTD or None, state), as `GatedDeltaNet.forward` does. settings_class: a dataclass. recurrent: it keeps a state S.
    state_layers, feature_layers: the linear layers in the order of their calls, those that the state needs and those
    that the features need besides; the last one ends the mixer. not_maps: matrices that AdamW updates, since they map
    features to numbers of heads. not_matrices: parameters of two dimensions that are no matrices.
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
        """(heads, K, V) of S, or zeros where the mixer keeps none."""
        return (0, 0, 0)

    @property
    def conv_pieces(self) -> tuple[int, ...]:
        """The channels of the short convolution, in the pieces that tensor ranks cut; empty where there is none."""
        return ()

    @property
    def conv_size(self) -> int:
        """Taps of the short convolution, 1 where there is none."""
        return 1

    def carried_bytes(self, narrow: int, sliding_window: int, carry_conv: bool) -> int:
        """Of one row across a boundary: S, and with `carry_conv` the convolution's tail, which are fp32."""
        tail = (self.conv_size - 1) * sum(self.conv_pieces) if carry_conv else 0
        return WIDE * (math.prod(self.state_shape) + tail)

    # Initial values and the optimizer.

    def initial_weight(self, name: str, draw: Draw) -> torch.Tensor | None:
        """fp32 values of a parameter of the mixer; None where it keeps the identity that it is built with.

        Here: normal weights of `model.init_std`, smaller by sqrt(2 * layers) in the matrix that ends the mixer; zeros
        for biases; norms as they are. Raises ConfigError for another parameter, of which the mixer's own spec must
        say how it begins.
        """
        if "norm" in name:
            return None
        if name.endswith("bias"):
            return torch.zeros(draw.shape)
        if not name.endswith(".weight") or len(draw.shape) != 2:
            raise ConfigError(
                f"model.layers: how {name} {list(draw.shape)} of the mixer '{self.kind}' begins is not known"
            )
        ends = name == f"{self.ends}.weight"
        return draw.normal(self.model.init_std / (math.sqrt(2 * len(self.model.layers)) if ends else 1))

    def fused_rows(self) -> Mapping[str, tuple[Rows, ...]]:
        """Of each parameter that holds several matrices, the rows of each: Muon orthogonalises them one by one."""
        return {}

    # Tensor ranks.

    @abstractmethod
    def sharding(self) -> dict[str, Sharding]:
        """How each parameter of the mixer lies on tensor ranks, by its name in the mixer."""

    @abstractmethod
    def cut(self, size: int) -> Any:
        """The settings of what one of `size` tensor ranks computes."""

    @abstractmethod
    def obstacles(self, size: int) -> Iterator[str]:
        """What cannot be cut over `size` tensor ranks, each as `<setting> (<value>)`."""

    def exchanged(self, size: int) -> int:
        """Elements a token that `size` tensor ranks exchange in the forward, in the narrow dtype."""
        return sum(rule.exchanged(size) for rule in self.sharding().values())

    @property
    def partial_gradients(self) -> int:
        """Elements of the parameters whose gradients are sums over tensor ranks (`Sharding.partial_gradient`)."""
        return 0

    @property
    def summed_squares(self) -> int:
        """Numbers a token that tensor ranks sum in fp32 for a norm over channels that are cut."""
        return 0

    # Costs.

    @abstractmethod
    def flops(self) -> MixerFlops:
        """Of one token, convolutions, norms and other elementwise work left out, as is usual for MFU."""

    def reach(self, tokens: int) -> int:
        """How many of so many tokens one attends to, itself included."""
        return tokens

    @abstractmethod
    def saved_bytes(self, length: int, state_only: bool, precision: Precision) -> int:
        """What autograd keeps of the mixer until its backward, a token of one row, in a window of `length` tokens.

        The model's settings are those of one tensor rank (`cut`). state_only: nobody reads the features.
        """

    def saved_mask_bytes(self, length: int) -> int:
        """What autograd keeps of the mixer's own mask, once for all rows."""
        return 0


def consecutive_rows(*sizes: int) -> tuple[Rows, ...]:
    """The rows of matrices that lie one below the other."""
    stops = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


def uneven(section: str, settings: Mapping[str, int], size: int) -> Iterator[str]:
    """The settings that `size` does not divide, as `MixerSpec.obstacles` names them."""
    yield from (f"model.{section}.{name} ({value})" for name, value in settings.items() if value % size)


def shareable(num_heads: int, head_dim: int, size: int) -> bool:
    """Whether each rank gets whole heads, or several ranks share one whose rows they store in equal parts."""
    return num_heads % size == 0 or (size % num_heads == 0 and num_heads * head_dim % size == 0)
