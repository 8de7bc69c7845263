"""A training step against transformers' `qwen3_5_text` of the same shape at N=1, and the cost of further passes.

Both models have the same weights, tokens and fused AdamW; their losses must agree. The shapes are the architecture's
own pattern (three Gated DeltaNet blocks, one attention), the models of `experiment=stdlib` and `experiment=rule110`,
and a wide one, whose step is nearly all matrix products, which both sides leave to one library.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import Row
from benchmarks.timing import METHOD as METHOD
from benchmarks.timing import round_robin
from sleeptrain.config.schema import AttentionConfig, Config, GatedDeltaNetConfig, ModelConfig, TrainConfig
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.hf.families import family_of
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.step import forward_backward, step_context

GOAL = 1.5
PATTERN = ["gated_deltanet"] * 3 + ["attention"]
ALTERNATING = ["attention", "gated_deltanet"]


def _model(dim: int, layers: list[str], attention: tuple[int, int, int], heads: int, state_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=2048,
        dim=dim,
        ffn_dim=3 * dim,
        layers=layers,
        attention=AttentionConfig(*attention),
        gated_deltanet=GatedDeltaNetConfig(heads, heads, state_dim, state_dim),
    )


# name: (model, rows, tokens of a row)
SHAPES = {
    "3:1 pattern, width 128, K=64": (_model(128, PATTERN, (2, 1, 64), 4, 64), 8, 256),
    "stdlib model, width 128, K=32": (_model(128, ALTERNATING * 2, (4, 2, 32), 4, 32), 8, 256),
    "rule110 model, width 64, K=32": (_model(64, ALTERNATING, (2, 2, 32), 2, 32), 32, 32),
    "3:1 pattern, width 512, K=128": (_model(512, PATTERN, (4, 2, 128), 4, 128), 4, 512),
}


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for name, (model, num_rows, num_tokens) in SHAPES.items():
        rounds = 2 if quick else 6 if model.dim > 128 else 16  # the least of few short steps varies by a tenth
        rows += _against_transformers(name, model, num_rows, num_tokens, rounds)
    return rows + _passes(2 if quick else 6)


def _batch(num_rows: int, num_tokens: int, goes_on: bool) -> Batch:
    """One document per row. The last token of a row has no target."""
    torch.manual_seed(0)
    tokens = torch.randint(2048, (num_rows, num_tokens))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    apart = torch.zeros(num_rows, dtype=torch.bool)
    return Batch(tokens, targets, torch.zeros_like(tokens), apart, torch.full_like(apart, goes_on))


def _step(model: Hybrid, batch: Batch, shape: StepShape) -> Callable[[], float]:
    config = Config(model=model.config, train=TrainConfig(tokens=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = forward_backward(step_context(config, shape, model), model, batch, shape, None).loss
        optimizer.step()
        return loss

    return step


def _against_transformers(name: str, config: ModelConfig, num_rows: int, num_tokens: int, rounds: int) -> list[Row]:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    family = family_of("qwen3_5_text")
    theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**family.to_config(config)))
    ours = Hybrid(config)
    ours.load_state_dict(dict(family.to_ours(config, theirs.state_dict().__getitem__)))
    batch = _batch(num_rows, num_tokens, goes_on=False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

    def their_step() -> float:
        optimizer.zero_grad()
        loss = theirs(batch.tokens_BT, labels=batch.tokens_BT).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    our_step = _step(ours, batch, StepShape(1, num_tokens, num_rows))
    a, b = our_step(), their_step()
    if abs(a - b) > 1e-3 * abs(b):
        raise RuntimeError(f"{name}: the losses differ, {a} and {b}: the two models are not the same")
    seconds = round_robin({"ours": our_step, "theirs": their_step}, rounds)
    return [
        Row(f"{name}: times faster than transformers", seconds["theirs"] / seconds["ours"], "x", GOAL),
        Row(f"{name}: ours", seconds["ours"] * 1e3, "ms", better="lower"),
        Row(f"{name}: transformers", seconds["theirs"] * 1e3, "ms", better="lower"),
    ]


def _passes(rounds: int) -> list[Row]:
    """The step of `experiment=stdlib`, eight windows that all sleep, at N=4 against N=1."""
    config, num_rows, num_tokens = SHAPES["stdlib model, width 128, K=32"][0], 4, 1024
    model = Hybrid(config)
    model.init_weights(0)
    batch = _batch(num_rows, num_tokens, goes_on=True)
    steps = {str(n): _step(model, batch, StepShape(n, num_tokens // 8, num_rows)) for n in (1, 2, 4)}
    seconds = round_robin(steps, rounds)
    return [
        Row(f"step at N={n} against N=1, every window sleeps", seconds[str(n)] / seconds["1"], "x", n, "lower")
        for n in (2, 4)
    ]
