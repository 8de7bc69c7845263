"""Compare a Hugging Face folder with our model: logits over several windows and passes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from sleeptrain.config.schema import ModelConfig
from sleeptrain.data.batch import Batch
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.native import load_native, native_logits
from sleeptrain.hf.families import Family, Read
from sleeptrain.hf.published import load_published, published_logits
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.loop import LoopSettings, run_rounds
from sleeptrain.sleep.rounds import Round, plan_rounds, window_facts

WINDOWS, PASSES, ROWS = 4, 3, 2
TOLERANCE = 1e-4


def check(config: ModelConfig, read: Read, folder: Path, family: Family, num_tokens: int) -> float:
    """Run our model with the parameters of `read`, then the family's model of `folder`, both in fp32 on the CPU.

    num_tokens: tokens of a row, cut into WINDOWS windows. Returns max |difference of logits| / max |logit|. Raises
    DataError: the result is more than TOLERANCE, or NaN.
    """
    window = -(-num_tokens // WINDOWS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (ROWS, num_tokens), generator=generator)
    ours = our_logits(_model(config, read), tokens, window, PASSES)
    theirs = _their_logits(folder, family, tokens, window)
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= TOLERANCE:
        raise DataError(
            f"the check failed: over {WINDOWS} windows of {PASSES} passes the logits of the two models differ by "
            f"{error:.1e} of the largest, more than {TOLERANCE:.0e}; nothing was written"
        )
    return error


def _their_logits(folder: Path, family: Family, tokens_BT: torch.Tensor, window: int) -> torch.Tensor:
    """Logits [B, T, V] of transformers' class, or of sleeptrain.hf.published if transformers has none."""
    if family.in_transformers:
        return native_logits(load_native(folder, family), tokens_BT, window, PASSES)
    return published_logits(load_published(folder, family), tokens_BT, window, PASSES)


def _model(config: ModelConfig, read: Read) -> Hybrid:
    with torch.device("meta"):
        model = Hybrid(config)
    model.load_state_dict({name: read(name).float() for name, _ in model.named_parameters()}, assign=True)
    return model


@torch.no_grad()
def our_logits(model: Hybrid, tokens_BT: torch.Tensor, window: int, passes: int) -> torch.Tensor:
    """The logits [B, T, V] that training computes under hard eviction when every window sleeps."""
    documents, false_B = torch.zeros_like(tokens_BT), torch.zeros(tokens_BT.shape[0], dtype=torch.bool)
    # A target at every token makes the loop compute all logits; the values of the targets do not matter.
    batch = Batch(tokens_BT, tokens_BT, documents, false_B, ~false_B)
    rounds = plan_rounds(window_facts(batch, window), passes, "every", "features")
    logits: dict[int, list[torch.Tensor]] = defaultdict(list)

    def keep(r: Round, _first: int, logits_NV: torch.Tensor, _targets: torch.Tensor) -> None:
        logits[r.window].append(logits_NV)

    run_rounds(model, batch, rounds, model.empty_state(), LoopSettings((0, model.num_layers)), keep)
    num_rows = tokens_BT.shape[0]
    return torch.cat([torch.cat(parts).unflatten(0, (num_rows, -1)) for parts in logits.values()], dim=1)
