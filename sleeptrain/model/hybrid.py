"""The decoder: embeddings, blocks whose mixers are attention or recurrences, a norm and a head."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.block import Block
from sleeptrain.model.decay import init_decay
from sleeptrain.model.layout import Layout
from sleeptrain.model.norm import RMSNorm
from sleeptrain.model.state import HARD, Boundary, FastWeights, LayerState

# Runs one block; replaced by a checkpointing one when activations are recomputed.
RunBlock = Callable[..., tuple[torch.Tensor | None, LayerState]]


class Hybrid(nn.Module):
    """A stack of blocks. It knows nothing of windows and passes: `run` reads features and states and returns both."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(kind, config) for kind in config.layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def empty_state(self) -> FastWeights:
        """The memory at the start of a document: nothing (a mixer takes None as S = 0)."""
        return FastWeights((None,) * self.num_layers)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens_BT)

    def run(
        self,
        x_BTD: torch.Tensor | None,
        state: FastWeights,
        layout: Layout,
        *,
        first: int = 0,
        last: int | None = None,
        boundary: Boundary = HARD,
        state_only: bool = False,
        run_block: RunBlock | None = None,
    ) -> tuple[torch.Tensor | None, FastWeights]:
        """The blocks [first, last) over one window.

        x_BTD: features; state: of all layers. Returns the features and the state with these blocks' entries renewed.
        `state_only`: nobody reads the features: blocks behind the last one that leaves a state are not run, and the
        features returned are None.
        """
        last = self.num_layers if last is None else last
        if state_only:
            last = state_only_end(self.config.layers, first, last, boundary.sliding_window is not None)
        states: list[LayerState] = []
        x = x_BTD
        for index in range(first, last):
            block = self.blocks[index]
            arguments = (x, state[index], layout, boundary, state_only and index == last - 1)
            x, left = block(*arguments) if run_block is None else run_block(block, *arguments)
            states.append(left)
        return (None if state_only else x), state.replace(first, states)

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Features of any leading shape -> logits over the vocabulary, in the features' dtype."""
        return F.linear(self.norm(x_ND), self.head_weight.to(x_ND.dtype))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of `init_std`, branch outputs smaller by sqrt(2 * layers), decays as Mamba does.

        Every parameter draws from a generator seeded by (seed, its name): the values do not depend on how the model is
        laid out over ranks or on which other parameters exist.
        """
        std, out_std = self.config.init_std, self.config.init_std / math.sqrt(2 * self.num_layers)
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            generator = parameter_generator(seed, name)
            if "norm" in name or leaf in ("A_log", "dt_bias", "D", "conv_bias"):
                continue  # norms and D keep the identity they were built with; the decays follow below
            if leaf == "conv_weight":
                bound = 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            else:
                scale = out_std if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")) else std
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))
        for name, module in self.named_modules():
            if hasattr(module, "A_log"):
                A_log, dt_bias = torch.empty(module.A_log.shape), torch.empty(module.dt_bias.shape)
                init_decay(A_log, dt_bias, parameter_generator(seed, f"{name}.A_log"))
                module.A_log.copy_(A_log)
                module.dt_bias.copy_(dt_bias)


def state_only_end(layers: list[str], first: int, last: int, sliding: bool) -> int:
    """Behind the last block of [first, last) that leaves a state; `first` where none does.

    Recurrent mixers always leave one, attention only under sliding eviction.
    """
    return max((i + 1 for i in range(first, last) if sliding or layers[i] != "attention"), default=first)


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the parameter's name alone."""
    # torch's CPU generator reads the low 32 bits of its seed only, so both must end up there.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
