"""The decoder: embeddings, blocks whose mixers are attention or recurrences, a norm and a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.mixers import is_recurrent
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout
from sleeptrain.model.embedding import Embedding
from sleeptrain.model.linear import Linear, Product
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.model.mixers.spec import Draw
from sleeptrain.model.norm import RMSNorm
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.state import HARD, Boundary, FastWeights, LayerState
from sleeptrain.model.undrawn import lacks_values
from sleeptrain.ops.device import runs_kernels
from sleeptrain.ops.linear_cross_entropy import linear_cross_entropy

# Elements of logits that are held at once: 256 MiB in fp32. On a GPU four times as many, 512 MiB in bf16: its products
# are slow with fewer rows.
MOST_LOGITS = 2**26
TIMES_ON_A_GPU = 4

# Runs one block. Under recomputation of blocks it checkpoints the block's activations.
RunBlock = Callable[..., tuple[torch.Tensor | None, LayerState]]
# Called with the index of the first of some rows, their logits [n, V] in fp32 or wider, and their targets [n].
ReadRows = Callable[[int, torch.Tensor, torch.Tensor], None]


class Blocks(nn.ModuleDict):
    """Blocks by their number in the whole model, ascending. A part of a model holds some of the blocks."""

    def __getitem__(self, layer: int) -> nn.Module:  # type: ignore[override]
        return super().__getitem__(str(layer))


class Hybrid(Product, nn.Module):
    """A stack of blocks. It knows nothing of windows and passes: `run` reads features and states and returns both.

    layers: the blocks that this part of the model holds; None: all. The first part has the embeddings, the last part
    the norm and the head; both have tied embeddings. Parameters and blocks keep the names and numbers of the whole
    model.
    head_part: the part of the head that this part of the model holds, whatever its blocks (`HeadPart`); with tied
    embeddings these rows of the embedding. None: the last part of the model holds the whole head.
    residual_dtype: of the features between blocks; None: that of the weights.
    """

    residual_dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig, layers: range | None = None, head_part: VocabularyPart | None = None):
        super().__init__()
        self.config, self.head_part = config, head_part
        self.layers = range(len(config.layers)) if layers is None else layers
        begins, ends = self.layers.start == 0, self.layers.stop == self.num_layers
        self._has_head = ends if head_part is None else True
        head_rows = config.vocab_size if head_part is None else len(head_part.rows(config.vocab_size))
        embeds, rows = begins or (self._has_head and config.tie_embeddings), config.vocab_size if begins else head_rows
        self.embedding: nn.Module | None = Embedding(rows, config.dim) if embeds else None
        self.blocks = Blocks({str(i): Block(i, config) for i in self.layers})
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm) if ends else None
        untied = self._has_head and not config.tie_embeddings
        self.head = Linear(config.dim, head_rows, bias=False) if untied else None

    @property
    def num_layers(self) -> int:
        """The number of blocks of the whole model, also for a part."""
        return len(self.config.layers)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def matrix(self) -> torch.Tensor | None:
        """The head's matrix if it is tied to the embeddings, else None: `head` has it, or another part of the model."""
        if not self._has_head or self.head is not None or self.embedding is None:
            return None
        return cast(torch.Tensor, self.embedding.weight)

    @property
    def used_rows(self) -> slice | None:
        """The rows of `matrix` that the head has; None: all. The first of several parts embeds with more."""
        if self.head_part is None or self.layers.start > 0:
            return None
        rows = self.head_part.rows(self.config.vocab_size)
        return slice(rows.start, rows.stop)

    @property
    def vocabulary(self) -> range:
        """The ids of the tokens that this part's head predicts."""
        vocab_size = self.config.vocab_size
        return range(vocab_size) if self.head_part is None else self.head_part.rows(vocab_size)

    @property
    def head_product(self) -> Product:
        """The module that multiplies by the head's matrix."""
        return self if self.head is None else self.head

    @property
    def head_weight(self) -> torch.Tensor:
        if self.head is not None:
            return self.head.weight
        matrix = self.matrix
        assert matrix is not None, "this part of the model has no head"
        return matrix if self.used_rows is None else matrix[self.used_rows]

    def empty_state(self) -> FastWeights:
        """The empty memory at the start of a document (a mixer takes None as S = 0)."""
        return FastWeights((None,) * self.num_layers)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        assert self.embedding is not None, "this part of the model has no embeddings"
        x, factor = self.embedding(tokens_BT), self.config.embedding_multiplier
        x = x if self.residual_dtype is None else x.to(self.residual_dtype)
        return x if factor == 1 else x * factor

    def run(
        self,
        x_BTD: torch.Tensor | None,
        state: FastWeights,
        layout: DocumentLayout,
        *,
        first: int | None = None,
        last: int | None = None,
        boundary: Boundary = HARD,
        state_only: bool = False,
        run_block: RunBlock | None = None,
    ) -> tuple[torch.Tensor | None, FastWeights]:
        """Runs the blocks [first, last) over one window; the default is all blocks of this part.

        x_BTD: features. state: the state of all layers. Returns the features, and the state with new entries for these
        blocks. state_only: nobody reads the features: blocks after the last one that leaves a state are not run, and
        None is returned as the features.
        """
        first = self.layers.start if first is None else first
        last = self.layers.stop if last is None else last
        if state_only:
            last = state_only_end(self.config.layers, first, last, boundary.sliding_window is not None)
        states: list[LayerState] = []
        x = x_BTD
        for index in range(first, last):
            block = self.blocks[index]
            arguments = (x, state[index], layout, boundary, state_only and index == last - 1)
            x, new_state = block(*arguments) if run_block is None else run_block(block, *arguments)
            states.append(new_state)
        return (None if state_only else x), state.replace(first, states)

    def fed_back(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The core's output features as the next pass reads them."""
        if not self.config.norm_between_passes:
            return x_BTD
        assert self.norm is not None, "this part of the model has no norm"
        return self.norm(x_BTD)

    def head_input(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Features [N, D] -> what the head multiplies by its matrix [N, D], in the dtype of products."""
        assert self.norm is not None, "this part of the model has no norm"
        return self.head_product.narrow(self.norm(x_ND) / self.config.logits_divisor)

    def join_statistics(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The statistics [2, N] of the whole vocabulary, from those of all its parts (`HeadPart.statistics`)."""
        log_sums, target_logits = torch.stack(list(parts), 1)
        return torch.stack([log_sums.logsumexp(0), target_logits.sum(0)])

    def join_logits(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The logits [N, V] of the whole vocabulary, from those of all its parts in order (`HeadPart.logits`)."""
        return torch.cat(list(parts), 1)

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Features [..., D] -> logits [..., V] over the vocabulary, in the features' dtype."""
        assert self.norm is not None and self.head_part is None, "this part of the model has no whole head"
        logits, divisor = self.head_product.product(self.norm(x_ND), self.head_weight), self.config.logits_divisor
        return logits if divisor == 1 else logits / divisor

    def cross_entropy(
        self,
        x_ND: torch.Tensor,
        targets_N: torch.Tensor,
        read_logits: ReadRows | None = None,
        keep: bool = True,
    ) -> torch.Tensor:
        """The summed cross entropy of the targets (int64) in nats, a scalar in fp32 or wider.

        Logits of more than `MOST_LOGITS` elements are computed some rows at a time. keep: keep the logits for the
        backward where `keeps_logits` allows it; else it computes them again. A graph of logits that were read keeps
        them.
        """
        rows = rows_at_once(self.config.vocab_size, runs_kernels(x_ND))
        if read_logits is None:
            return self._summed_loss(x_ND, targets_N, rows, keep)
        losses = []
        for first in range(0, max(len(targets_N), 1), rows):
            chunk = slice(first, first + rows)
            losses.append(self._read_loss(x_ND[chunk], targets_N[chunk], partial(read_logits, first)))
        return torch.stack(losses).sum()

    def _read_loss(
        self, x_ND: torch.Tensor, targets_N: torch.Tensor, read: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> torch.Tensor:
        """The loss from all logits at once. read: called with the logits and the targets."""
        logits = at_least_fp32(self.logits(x_ND))
        read(logits, targets_N)
        return F.cross_entropy(logits, targets_N, reduction="sum")

    def _summed_loss(self, x_ND: torch.Tensor, targets_N: torch.Tensor, rows: int, keep: bool) -> torch.Tensor:
        """The loss from the logits of at most `rows` rows at a time."""
        head, weight = self.head_product, self.head_weight
        x_ND, vocab_size = self.head_input(x_ND), self.config.vocab_size
        keep = keep and keeps_logits(len(targets_N), vocab_size, x_ND.itemsize)
        copy = None if head.compute_dtype is None else head.copy_of(weight)
        losses = linear_cross_entropy(
            x_ND, weight, targets_N, copy_VD=copy, gradient_VD=head.gradient, rows=rows, keep=keep
        )
        return losses.sum()

    @torch.no_grad()
    def init_weights(self, seed: int, names: Container[str] | None = None) -> None:
        """Draws the parameters (default: all) by `initial_weight`, one at a time on the CPU.

        Where that returns None, the parameter keeps the value that it is built with. Raises ConfigError if it has none.
        """
        for name, parameter in self.named_parameters():
            if names is not None and name not in names:
                continue
            weight = self._initial_weight(name, parameter, seed)
            if weight is not None:
                parameter.copy_(weight)
            elif lacks_values(parameter):
                raise ConfigError(f"model.layers: the spec of a mixer gives no initial values of {name}")

    def _initial_weight(self, name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor | None:
        """The initial values of a parameter of this part, as `initial_weight` gives those of the whole model."""
        shape, vocab_size = tuple(parameter.shape), self.config.vocab_size
        if self.head_part is None or name not in ("embedding.weight", "head.weight") or shape[0] == vocab_size:
            return initial_weight(self.config, name, shape, seed)
        whole = initial_weight(self.config, name, (vocab_size, *shape[1:]), seed)
        return None if whole is None else whole[self.head_part.rows(vocab_size)]


def initial_weight(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor | None:
    """The initial values of one parameter, fp32; None for norms, which begin as the identity.

    Weights are normal with standard deviation `init_std`, divided by sqrt(2 * layers) at the end of a branch. A mixer's
    spec draws the parameters of the mixer. The output of a mixer without a feed-forward is zero: its block begins as
    the identity.
    name, shape: of the parameter in the whole model. The generator is seeded by (seed, name): the values do not depend
    on the layout over ranks or on the other parameters.
    """
    draw = Draw(name, shape, seed)
    if ".mixer." in name:
        block, local_name = name.removeprefix("blocks.").split(".mixer.")
        spec = block_spec(config, int(block))
        if int(block) in config.mixer_only and local_name == f"{spec.ends}.weight":
            return torch.zeros(shape)
        return spec.initial_weight(local_name, draw)
    if "norm" in name:
        return None
    ends_branch = name.endswith("down_proj.weight")
    return draw.normal(config.init_std / (math.sqrt(2 * len(config.layers)) if ends_branch else 1))


def rows_at_once(vocab_size: int, kernels: bool = False) -> int:
    """The number of rows whose logits are held at once, a power of two. kernels: on a GPU."""
    most = MOST_LOGITS * (TIMES_ON_A_GPU if kernels else 1)
    return 1 << max(most // vocab_size, 1).bit_length() - 1


def keeps_logits(num_targets: int, vocab_size: int, itemsize: int) -> bool:
    """True if logits may be kept for a backward: those of 16 bits, and those that are held at once.

    itemsize: bytes of a logit.
    """
    return itemsize <= 2 or num_targets <= rows_at_once(vocab_size)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def state_only_end(layers: Sequence[str], first: int, last: int, sliding: bool) -> int:
    """One past the last block of [first, last) that leaves a state; `first` where no block leaves one.

    Recurrent mixers always leave a state, attention only under sliding eviction.
    """
    return next((i + 1 for i in reversed(range(first, last)) if sliding or is_recurrent(layers[i])), first)
