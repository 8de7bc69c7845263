"""The memory of passes: the peak of a step at N=8 against N=1, over eight windows, in every recompute mode.

The model is deep and narrow: 24 blocks in the 3:1 pattern. The fast weights of all its layers are about as large as the
features of a round, as in a 2B model with windows of 2,048 tokens.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import Row
from benchmarks.live_bytes import LiveBytes
from sleeptrain.config.schema import AttentionConfig, Config, GatedDeltaNetConfig, ModelConfig, SleepConfig, TrainConfig
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.recompute import MODES
from sleeptrain.sleep.step import forward_backward, step_context

METHOD = "the peak bytes of tensors that forward and backward of a step made, gradients included"
WINDOWS, WINDOW = 8, 256
GOALS = {"pass": 1.15, "window": 1.15}  # the modes that run whole rounds again
MODEL = ModelConfig(
    vocab_size=2048,
    dim=128,
    ffn_dim=384,
    layers=(["gated_deltanet"] * 3 + ["attention"]) * 6,
    attention=AttentionConfig(2, 1, 64),
    gated_deltanet=GatedDeltaNetConfig(2, 2, 32, 32),
)


def run(quick: bool) -> list[Row]:
    rows = []
    for mode in MODES:
        mib = {passes: _peak(mode, passes) / 2**20 for passes in ((1, 8) if not quick else (1, 4))}
        (_, least), (most, peak) = mib.items()
        rows += [Row(f"{mode}: N={passes}", value, "MiB", better="lower") for passes, value in mib.items()]
        goal = GOALS.get(mode)
        rows.append(Row(f"{mode}: N={most} against N=1", peak / least, "x", goal, "lower"))
    return rows


def _peak(mode: str, passes: int) -> int:
    """Peak bytes of a step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Hybrid(MODEL)
    model.init_weights(0)
    model.to(device)
    config = Config(model=MODEL, sleep=SleepConfig(recompute=mode), train=TrainConfig(tokens=1))
    shape = StepShape(passes, WINDOW, 1)
    step = partial(forward_backward, step_context(config, shape, model), model, _batch(), shape, None)
    if device.type == "cpu":
        with LiveBytes() as memory:
            step()
        return memory.peak
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _batch() -> Batch:
    """One row of a long document that continues after it, so that every window sleeps."""
    tokens = torch.randint(MODEL.vocab_size, (1, WINDOWS * WINDOW), generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.bool)
    return Batch(tokens, tokens, torch.zeros_like(tokens), ~one, one)
