"""One training step of a tiny model, on one process or a tensor rank: no result may depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

from sleeptrain.config.schema import (
    AttentionConfig,
    GatedDeltaNetConfig,
    JetConfig,
    Mamba2Config,
    ModelConfig,
    TrainConfig,
)
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.model.compiled import compile_blocks
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import HARD, Boundary, FastWeights, Recurrent, Retained
from sleeptrain.parallel.build import build_model
from sleeptrain.parallel.tensor.sharding import ModelSharding, own_heads
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.precision import in_precision
from sleeptrain.sleep.recompute import Recompute
from sleeptrain.sleep.rounds import plan_rounds, window_facts
from tests.configs import change
from tests.models import random_batch
from tests.parallel.state_shards import join_state, take_state

# Settings of families other than the native one.
OTHER_OPTIONS: dict[str, Any] = {
    "norm": "plain",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_divisor": 2.0,
    "attention.scale": 0.2,
    "attention.gate": False,
    "attention.partial_rotary_factor": 0.0,
    "gated_deltanet.allow_neg_eigval": True,
    "gated_deltanet.norm_eps": 1e-3,
}
ONE_DOCUMENT = [[0] * 12, [0] * 12]
DOCUMENTS_AND_PADS = [[0] * 3 + [1] * 6 + [2] * 3, [-1] * 5 + [0] * 3 + [1] * 4]


@dataclass(frozen=True)
class Case:
    layers: tuple[str, ...] = ("attention", "gated_deltanet", "mamba2")
    passes: int = 1
    documents: list[list[int]] = field(default_factory=lambda: DOCUMENTS_AND_PADS)
    boundary: Boundary = HARD
    when: str = "every"
    feedback: str = "features"
    recompute: str = "none"
    core: tuple[int, int] | None = None
    tied: bool = True
    num_kv_heads: int = 2
    num_groups: int = 2
    vocab_size: int = 17
    carried: bool = False  # the step begins with a memory
    sequence: bool = False
    multiple: int = 1  # divides the tokens of every round
    dtype: torch.dtype = torch.float64
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)  # other settings of the model
    compiled: bool = False

    @property
    def config(self) -> ModelConfig:
        config = ModelConfig(
            vocab_size=self.vocab_size,
            dim=16,
            ffn_dim=24,
            layers=list(self.layers),
            tie_embeddings=self.tied,
            attention=AttentionConfig(num_heads=4, num_kv_heads=self.num_kv_heads, head_dim=8, sliding_window=3),
            gated_deltanet=GatedDeltaNetConfig(num_k_heads=4, num_v_heads=8, head_k_dim=6, head_v_dim=4),
            jet=JetConfig(num_heads=4, head_k_dim=6, head_v_dim=4, kernel_dim=8),
            mamba2=Mamba2Config(num_heads=4, head_dim=4, state_dim=8, num_groups=self.num_groups),
        )
        return change(config, self.model)

    @property
    def batch(self) -> Batch:
        rows = len(self.documents)
        share = 0.3 if self.when == "unlabelled" else 1.0
        batch = random_batch(self.documents, target_share=share, carried=[self.carried] * rows, continues=[True] * rows)
        return within(batch, self.vocab_size)


def within(batch: Batch, vocab_size: int) -> Batch:
    """The batch, its tokens mapped into a smaller vocabulary."""
    targets = torch.where(batch.targets_BT == IGNORE, IGNORE, batch.targets_BT % vocab_size)
    return replace(batch, tokens_BT=batch.tokens_BT % vocab_size, targets_BT=targets)


def whole_weights(case: Case) -> dict[str, torch.Tensor]:
    """Weights that are large enough for every path to matter."""
    model = Hybrid(case.config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)

    def disturbed(p: torch.Tensor) -> torch.Tensor:
        return (p.detach().double() + torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2).to(
            case.dtype
        )

    return {name: disturbed(p) for name, p in model.named_parameters()}


def random_state(case: Case, seed: int) -> FastWeights:
    """Random memory, of the shapes of the memory after the case's batch."""
    model = Hybrid(case.config).to(case.dtype)
    settings = LoopSettings((0, model.num_layers), case.boundary)
    batch = within(random_batch(ONE_DOCUMENT, continues=[True, True]), case.vocab_size)
    model.init_weights(0)
    with torch.no_grad():
        _, state = run_rounds(model, batch, plan_rounds(window_facts(batch, 4), 1), model.empty_state(), settings)
    generator = torch.Generator().manual_seed(seed)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return (torch.randn(t.shape, generator=generator, dtype=torch.float64) * 0.5).to(t.dtype)

    return each_number(noise, state)


def each_number(function: Callable[[torch.Tensor], torch.Tensor], state: FastWeights) -> FastWeights:
    """The state with `function` applied to its floating point tensors, not to the documents of retained tokens."""
    return tree_map(lambda t: function(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, state)


@dataclass
class Outcome:
    loss: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    state: FastWeights
    state_gradient: FastWeights | None


def run_case(case: Case, model: Hybrid, start: FastWeights, weights: FastWeights) -> Outcome:
    """A step whose loss also reads the memory after it, weighted by `weights`."""
    batch = case.batch
    settings = LoopSettings(case.core or (0, model.num_layers), case.boundary, Recompute(case.recompute))
    rounds = plan_rounds(window_facts(batch, 4), case.passes, case.when, case.feedback, case.multiple)
    if case.carried:
        start = each_number(lambda t: t.clone().requires_grad_(), start)
    train = TrainConfig(tokens=1, precision=case.precision)
    with in_precision(train, model):
        losses, state = run_rounds(model, batch, rounds, start if case.carried else model.empty_state(), settings)
        loss = torch.stack(list(losses.values())).sum()
        read = [(s * w).sum() for s, w in zip(tensors(state), tensors(weights), strict=True)]
        (loss + sum(read)).backward()
    seen: list[torch.Tensor] = []
    with torch.no_grad(), in_precision(train, model):
        other = run_rounds(
            model,
            batch,
            rounds,
            start if case.carried else model.empty_state(),
            settings,
            lambda _r, _first, logits, _targets: seen.append(logits),
        )[0]
    torch.testing.assert_close(torch.stack(list(other.values())).sum(), loss.detach())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    start_gradient = each_number(lambda t: t.grad, start) if case.carried else None
    return Outcome(loss.detach(), torch.cat(seen), gradients, state.detach(), start_gradient)


def tensors(state: FastWeights) -> list[torch.Tensor]:
    return [t for t in state.to_state_dict().values() if t.is_floating_point()]


def run_single(case: Case) -> Outcome:
    model = Hybrid(case.config).to(case.dtype)
    model.load_state_dict(whole_weights(case))
    return run_case(case, model, random_state(case, 1), random_state(case, 2))


@cache
def mesh_of(size: int) -> Mesh:
    """`size` tensor ranks. A process makes it once."""
    return Mesh.build(size, 1)


def run_rank(case: Case, size: int) -> Outcome:
    """The same step on one of `size` tensor ranks, from its shards of the same values."""
    mesh = mesh_of(size)
    model = build_model(case.config, mesh, sequence=case.sequence).to(case.dtype)
    sharding, rank = ModelSharding(case.config, size), mesh.tensor.rank
    model.load_state_dict({n: sharding.take(n, w, rank) for n, w in whole_weights(case).items()})
    if case.compiled:
        compile_blocks(model)
    weights = take_state(sharding, random_state(case, 2), rank)
    return run_case(case, model, take_state(sharding, random_state(case, 1), rank), _once(case, weights, rank, size))


def _once(case: Case, weights: FastWeights, rank: int, size: int) -> FastWeights:
    """A key-value head that ranks share is read by the first of them only."""
    if rank == 0 or own_heads(case.num_kv_heads, rank - 1, size) != own_heads(case.num_kv_heads, rank, size):
        return weights
    layers = [
        Retained(s.k_BLGD * 0, s.v_BLGD * 0, s.documents_BL) if isinstance(s, Retained) else s for s in weights.layers
    ]
    return FastWeights(tuple(layers))


def join_outcomes(case: Case, parts: list[Outcome]) -> Outcome:
    sharding = ModelSharding(case.config, len(parts))
    gradients = {n: sharding.join(n, [part.gradients[n] for part in parts]) for n in parts[0].gradients}
    state_gradient = None
    if case.carried:
        state_gradient = join_state(sharding, [_summed(case, parts, rank) for rank in range(len(parts))])
    state = join_state(sharding, [part.state for part in parts])
    return Outcome(parts[0].loss, parts[0].logits, gradients, state, state_gradient)


def _summed(case: Case, parts: list[Outcome], rank: int) -> FastWeights:
    """A rank's gradient of its memory; that of a shared key-value head is summed over the ranks that read the head."""
    own = own_heads(case.num_kv_heads, rank, len(parts))
    sharers = [p for r, p in enumerate(parts) if own_heads(case.num_kv_heads, r, len(parts)) == own]
    layers = []
    for index, layer in enumerate(parts[rank].state_gradient.layers):
        if isinstance(layer, Retained):
            them = [p.state_gradient[index] for p in sharers]
            layer = Retained(sum(s.k_BLGD for s in them), sum(s.v_BLGD for s in them), layer.documents_BL)
        layers.append(layer)
    return FastWeights(tuple(layers))


def assert_same_outcome(found: Outcome, expected: Outcome, **tolerance: float) -> None:
    torch.testing.assert_close(found.loss, expected.loss, **tolerance)
    torch.testing.assert_close(found.logits, expected.logits, **tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            found.gradients[name], gradient, **tolerance, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
    for ours, theirs in ((found.state, expected.state), (found.state_gradient, expected.state_gradient)):
        if theirs is not None:
            assert any(isinstance(s, Recurrent) for s in theirs.layers)
            for (name, a), b in zip(ours.to_state_dict().items(), theirs.to_state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"state {name}: {m}")
