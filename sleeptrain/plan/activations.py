"""What autograd keeps of a round until its backward, in bytes: counted by hand from the modules, tested against them.

Numbers are for one token of one row unless said otherwise. `narrow` is the size of an element that autocast makes
narrow (2 bytes in bf16, else 4): products and attention; norms, gates, convolutions and the residual stream are wide.
Under autocast each linear layer keeps a narrow copy of its input of its own, in fp32 all share one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.mixers import of_mixer
from sleeptrain.config.ranges import ATTENTION_MIXERS
from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.ops.chunks import Cut
from sleeptrain.ops.gated_delta_rule import chunk_size
from sleeptrain.ops.ssd import CHUNK as SSD_CHUNK
from sleeptrain.parallel.tensor.sharding import local_config
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.rounds import Round

WIDE = 4
FLA_CHUNK = 64  # tokens of a chunk in flash-linear-attention, whose [C, C] inverse it keeps


@dataclass(frozen=True)
class Activations:
    """Counts for one process. kernels: the recurrences are flash-linear-attention's, as on a GPU, else PyTorch's."""

    model: ModelConfig  # of one tensor rank
    narrow: int
    kernels: bool
    token_parts: int  # in how many parts `parallel.sequence` cuts the tokens between mixers

    @staticmethod
    def of(config: Config, kernels: bool) -> Activations:
        parallel = config.parallel
        narrow = 2 if config.train.precision == "bf16" else WIDE
        return Activations(
            local_config(config.model, parallel.tensor), narrow, kernels, parallel.tensor if parallel.sequence else 1
        )

    def block(self, layer: int, r: Round, state_only: bool) -> int:
        """Of a block in a round over all its rows, S that the recurrence begins with included."""
        length, m = r.stop - r.start, self.model
        mixers = {
            "attention": self._attention,
            "sliding_attention": self._attention,
            "gated_deltanet": self._gated_deltanet,
            "jet": self._jet,
            "mamba2": self._mamba2,
        }
        kind, has_mlp = m.layers[layer], layer not in m.mixer_only
        token = self._norm() + of_mixer(mixers, kind, "the memory")(length, state_only)
        if not state_only and has_mlp:
            token += self._norm() + self._inputs(2) + 4 * m.ffn_dim * self.narrow
            token += 2 * self._norm() * m.sandwich_norms
        mask = length**2 if kind == "sliding_attention" and m.attention.sliding_window < length else 0
        return len(r.rows) * (length * token + state_bytes(m, kind)) + mask * (not state_only)

    def fed_back(self, r: Round) -> int:
        """Of the norm of what is fed back; the head's norm keeps the same input."""
        given = self.model.norm_between_passes and not r.loss and not r.state_only
        return len(r.rows) * (r.stop - r.start) * WIDE * (self.model.dim + 1) if given else 0

    def head(self, num_targets: int) -> int:
        """Of the last norm, the head and the loss."""
        m = self.model
        return num_targets * (WIDE * m.dim + WIDE + self.narrow * m.dim + WIDE * m.vocab_size)

    def logits(self, num_targets: int) -> int:
        """What the loss holds at its worst, in its backward: probabilities, and a gradient before and after softmax."""
        return 3 * WIDE * self.model.vocab_size * num_targets

    def casts(self, layers: range, head: bool) -> int:
        """The narrow copies of these layers' matrices, which autocast makes and the backward needs."""
        if self.narrow == WIDE:
            return 0
        m = self.model
        return self.narrow * (sum(_matrix_elements(m, i) for i in layers) + head * m.vocab_size * m.dim)

    def _norm(self) -> int:
        """A norm in front of a region keeps its input, which is the residual stream."""
        return (WIDE * self.model.dim + WIDE) // self.token_parts

    def _inputs(self, count: int) -> int:
        """The inputs of `count` linear layers that read the same features."""
        return self.narrow * self.model.dim * (count if self.narrow < WIDE else 1)

    def _attention(self, length: int, state_only: bool) -> int:
        c, narrow = self.model.attention, self.narrow
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if state_only:
            return self._inputs(2) + (WIDE * kv if c.qk_norm != "none" else 0)
        # Rotated queries and keys, values, what attention gives, and that again: gated, or with its heads side by side.
        token = self._inputs(3) + narrow * (3 * q + 2 * kv) + WIDE * c.num_heads
        if c.gate:
            token += narrow * q
        if c.qk_norm != "none":  # their inputs; in fp32 the query's is one tensor with the gate
            shared = q if c.gate and narrow == WIDE else 0
            token += WIDE * (q + kv + shared + c.num_heads + c.num_kv_heads)
        return token

    def _gated_deltanet(self, length: int, state_only: bool) -> int:
        c = self.model.gated_deltanet
        keys, values = c.num_k_heads * c.head_k_dim, c.num_v_heads * c.head_v_dim
        conv = 2 * keys + values
        # The convolution's input and what it makes of it before SiLU, q k v, and both gates on their way.
        token = self._inputs(3 if state_only else 4) + 2 * WIDE * conv + self.narrow * conv + 4 * WIDE * c.num_v_heads
        return token + self._delta_rule(length, c.num_k_heads, c.num_v_heads, (c.head_k_dim, c.head_v_dim), state_only)

    def _jet(self, length: int, state_only: bool) -> int:
        c = self.model.jet
        keys, values = c.num_heads * c.head_k_dim, c.num_heads * c.head_v_dim
        # Before and behind SiLU: queries and keys, what kernels are made of, values, which are wide before; kernels.
        token = self._inputs(6 if state_only else 7) + self.narrow * (4 * keys + 2 * c.kernel_dim)
        token += 2 * WIDE * values + self.narrow * (1 + c.conv_size) * values + 4 * WIDE * c.num_heads
        return token + self._delta_rule(length, c.num_heads, c.num_heads, (c.head_k_dim, c.head_v_dim), state_only)

    def _delta_rule(
        self, length: int, key_heads: int, value_heads: int, head_dims: tuple[int, int], state_only: bool
    ) -> int:
        """Of the recurrence and its gated norm."""
        K, V = head_dims
        if self.kernels:
            token = value_heads * (self.narrow * FLA_CHUNK + WIDE) + 2 * WIDE * key_heads
        else:
            size = _chunk(length, chunk_size(K))
            token = WIDE * value_heads * (3 * K + V + 2 + 4 * size + K * V // size)
        if not state_only:  # norm and gate, and their product, which the projection reads
            token += (4 * WIDE + self.narrow) * value_heads * V + WIDE * value_heads
        return token

    def _mamba2(self, length: int, state_only: bool) -> int:
        c = self.model.mamba2
        inner, groups = c.num_heads * c.head_dim, c.num_groups * c.state_dim
        conv = inner + 2 * groups
        token = self._inputs(1) + 2 * WIDE * conv + self.narrow * conv + 2 * WIDE * c.num_heads
        if self.kernels:  # B and C repeated for each head, x times dt
            token += self.narrow * (2 * c.num_heads * c.state_dim + inner) + WIDE * (inner + c.num_heads)
        else:
            size = _chunk(length, SSD_CHUNK)
            matrices = c.num_heads * (2 * size + c.state_dim * c.head_dim // size)
            token += WIDE * (2 * groups + 2 * inner + matrices)
        if not state_only:
            gate = inner + conv + c.num_heads if self.narrow == WIDE else inner  # one tensor with the other projections
            token += WIDE * (gate + 3 * inner + 1) + self.narrow * inner
        return token


def state_bytes(model: ModelConfig, kind: str) -> int:
    """S of a layer for one row."""
    g, j, m = model.gated_deltanet, model.jet, model.mamba2
    elements = {
        "attention": 0,
        "sliding_attention": 0,
        "gated_deltanet": g.num_v_heads * g.head_k_dim * g.head_v_dim,
        "jet": j.num_heads * j.head_k_dim * j.head_v_dim,
        "mamba2": m.num_heads * m.state_dim * m.head_dim,
    }
    return WIDE * of_mixer(elements, kind, "the state")


def carried_bytes(config: Config, workload: Workload, model: ModelConfig, kind: str) -> int:
    """All that a layer keeps of one row across a boundary: S, and on request the convolution's tail or a cache."""
    c, narrow = model.attention, 2 if config.train.precision == "bf16" else WIDE
    if kind in ATTENTION_MIXERS:
        per_token = 2 * narrow * c.num_kv_heads * c.head_dim + 8  # keys, values, and the token's document
        window = workload.sliding_window or 0
        return per_token * (min(window, c.sliding_window) if kind == "sliding_attention" else window)
    tail = 0
    if workload.settings.boundary.carry_conv:
        g, j, m = model.gated_deltanet, model.jet, model.mamba2
        keys = 2 * g.num_k_heads * g.head_k_dim
        tails = {
            "gated_deltanet": (g.conv_size - 1) * (keys + g.num_v_heads * g.head_v_dim),
            "jet": (j.conv_size - 1) * j.num_heads * j.head_v_dim,
            "mamba2": (m.conv_size - 1) * (m.num_heads * m.head_dim + 2 * m.num_groups * m.state_dim),
        }
        tail = of_mixer(tails, kind, "the convolution")
    return state_bytes(model, kind) + WIDE * tail


def _chunk(length: int, wanted: int) -> int:
    return Cut.of(length, wanted, 1).size


def _matrix_elements(model: ModelConfig, layer: int) -> int:
    """Of a block's linear layers."""
    feed_forward = 0 if layer in model.mixer_only else 3 * model.dim * model.ffn_dim
    return of_mixer(_MATRICES, model.layers[layer], "the size")(model) + feed_forward


def _attention_matrices(model: ModelConfig) -> int:
    a = model.attention
    return model.dim * (a.num_heads * a.head_dim * (3 if a.gate else 2) + 2 * a.num_kv_heads * a.head_dim)


def _gated_deltanet_matrices(model: ModelConfig) -> int:
    g = model.gated_deltanet
    return model.dim * (2 * g.num_k_heads * g.head_k_dim + 3 * g.num_v_heads * g.head_v_dim + 2 * g.num_v_heads)


def _jet_matrices(model: ModelConfig) -> int:
    j = model.jet
    values = j.num_heads * j.head_v_dim
    rows = 2 * j.num_heads * j.head_k_dim + 3 * values + j.kernel_dim + 2 * j.num_heads
    return model.dim * rows + j.kernel_dim * j.conv_size * values


def _mamba2_matrices(model: ModelConfig) -> int:
    m = model.mamba2
    return model.dim * (3 * m.num_heads * m.head_dim + 2 * m.num_groups * m.state_dim + m.num_heads)


_MATRICES = {
    "attention": _attention_matrices,
    "sliding_attention": _attention_matrices,
    "gated_deltanet": _gated_deltanet_matrices,
    "jet": _jet_matrices,
    "mamba2": _mamba2_matrices,
}
