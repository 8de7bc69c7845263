"""Decoding with sleep: the cost of a token, which does not depend on N; the cost of a sleep; and constant memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from benchmarks import Row, timing
from benchmarks.live_bytes import LiveBytes
from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.hf.model.cache import CACHE_NAME, SleepCache
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.modeling import SleepForCausalLM

METHOD = (
    f"{timing.METHOD}; a token: one forward with the cache, over 32 tokens inside a window; a sleep: the "
    "token that fills the window at N=4 less the same at N=1; memory: the peak bytes of tensors that reading a "
    "prompt made, without the weights and the prompt's ids"
)
WINDOW, SHORT, LONG = 256, 2048, 65_536
MODEL = ModelConfig(
    vocab_size=2048,
    dim=256,
    ffn_dim=768,
    layers=(["gated_deltanet"] * 3 + ["attention"]) * 2,
    attention=AttentionConfig(4, 2, 64),
    gated_deltanet=GatedDeltaNetConfig(4, 4, 64, 64),
)


def run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    model = SleepForCausalLM(SleepPretrainedConfig(model=asdict(MODEL), sleep={"passes": 4, "window": WINDOW})).eval()
    rounds = 7 if quick else 31
    token, last_token = _tokens(model, rounds), _last_token(model, rounds)
    lengths = (SHORT, LONG // (8 if quick else 1))
    kept, peak = zip(*(_memory(model, length) for length in lengths), strict=True)
    rows = [Row(f"a token, N={n}", 1e3 * seconds, "ms", better="lower") for n, seconds in token.items()]
    rows.append(Row("a token, N=4 against N=1", token["4"] / token["1"], "x", 1.02, "lower"))
    rows.append(Row("one sleep, N=4", 1e3 * (last_token["4"] - last_token["1"]), "ms", better="lower"))
    for name, mib in (("kept", kept), ("reading", peak)):
        rows += [
            Row(f"{name}, {length} tokens", value / 2**20, "MiB", better="lower")
            for length, value in zip(lengths, mib, strict=True)
        ]
        rows.append(Row(f"{name}, {lengths[1]} tokens against {SHORT}", mib[1] / mib[0], "x", 1.05, "lower"))
    return rows


def _tokens(model: SleepForCausalLM, rounds: int) -> dict[str, float]:
    """Seconds of one token in the middle of a window, by N."""
    count = WINDOW // 8  # short, so that other processes leave at least one round undisturbed
    seconds = timing.round_robin(_candidates(model, WINDOW // 4, count), rounds)
    return {n: total / count for n, total in seconds.items()}


def _last_token(model: SleepForCausalLM, rounds: int) -> dict[str, float]:
    """Seconds of the token that fills a window, with the sleep that follows."""
    return timing.round_robin(_candidates(model, WINDOW - 1, 1), rounds)


def _candidates(model: SleepForCausalLM, before: int, count: int) -> dict[str, Callable[[], object]]:
    with torch.no_grad():
        cache = model(_prompt(WINDOW + before), logits_to_keep=1)[CACHE_NAME]
    return {str(n): partial(_decode, model, cache, count, n) for n in (1, 4)}


@torch.no_grad()
def _decode(model: SleepForCausalLM, start: SleepCache, count: int, passes: int) -> None:
    cache, token = start.copy(), torch.zeros(1, 1, dtype=torch.long)
    for _ in range(count):
        logits = model(token, cache=cache, passes=passes).logits
        token = logits[:, -1:].argmax(-1)


def _memory(model: SleepForCausalLM, length: int) -> tuple[int, int]:
    """(bytes kept after reading a prompt, peak bytes while reading it)."""
    ids = _prompt(length)
    with LiveBytes() as memory, torch.no_grad():
        known = [p.view_as(p) for p in model.parameters()]
        before = memory.peak = memory.live
        cache = model(ids, logits_to_keep=1)[CACHE_NAME]
    assert known and cache.boundaries == (length // WINDOW,)
    return memory.live - before, memory.peak - before


def _prompt(length: int) -> torch.Tensor:
    return torch.randint(MODEL.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
