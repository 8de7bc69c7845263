"""Decoding with sleep: the cost of a token, which depends neither on N nor on a stop rule; the cost of a sleep, which
falls with the passes that a rule takes; and constant memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks import Row, timing
from benchmarks.live_bytes import LiveBytes
from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
from sleeptrain.hf.model.cache import CACHE_NAME, SleepCache
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.model.block import Block

METHOD = (
    f"{timing.METHOD}; a token: one forward with the cache, over 32 tokens inside a window; a sleep: the "
    "token that fills the window less the same at N=1, where a rule takes n of 4 passes by a threshold that ends a "
    "sleep as soon as sleep.min_passes=n allows; blocks: counted, each over one window; memory: the peak bytes of "
    "tensors that reading a prompt made, without the weights and the prompt's ids"
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
    model = _model()
    ruled = {n: _model(model, stop="change", stop_threshold=1e9, min_passes=n) for n in (2, 3)}
    readers = {"N=1": Reader(model, 1), "N=4": Reader(model, 4)}
    readers |= {f"change, {n} of 4 passes": Reader(of_rule, 4) for n, of_rule in ruled.items()}
    rounds = 7 if quick else 31
    token, last_token = _tokens(readers, rounds), _last_token(readers, rounds)
    rows = [Row(f"a token, {name}", 1e3 * seconds, "ms", better="lower") for name, seconds in token.items()]
    rows += [
        Row(f"a token, {name} against N=1", token[name] / token["N=1"], "x", 1.02, "lower")
        for name in token
        if name != "N=1"
    ]
    for name, reader in list(readers.items())[1:]:
        seconds, blocks = last_token[name] - last_token["N=1"], _blocks_of_a_sleep(reader)
        rows.append(Row(f"one sleep, {name}", 1e3 * seconds, "ms", better="lower"))
        rows.append(Row(f"one sleep, {name}, blocks", blocks, "", better="lower"))
    return rows + _memory_rows(model, quick)


@dataclass(frozen=True)
class Reader:
    """A model that reads with at most so many passes."""

    model: SleepForCausalLM
    passes: int


def _model(weights: SleepForCausalLM | None = None, **sleep: object) -> SleepForCausalLM:
    settings = {"passes": 4, "window": WINDOW} | sleep
    model = SleepForCausalLM(SleepPretrainedConfig(model=asdict(MODEL), sleep=settings)).eval()
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    return model


def _tokens(readers: Mapping[str, Reader], rounds: int) -> dict[str, float]:
    """Seconds of one token in the middle of a window, by reader."""
    count = WINDOW // 8  # short, so that other processes leave at least one round undisturbed
    seconds = timing.round_robin(_candidates(readers, WINDOW // 4, count), rounds)
    return {name: total / count for name, total in seconds.items()}


def _last_token(readers: Mapping[str, Reader], rounds: int) -> dict[str, float]:
    """Seconds of the token that fills a window, with the sleep that follows."""
    return timing.round_robin(_candidates(readers, WINDOW - 1, 1), rounds)


def _candidates(readers: Mapping[str, Reader], before: int, count: int) -> dict[str, Callable[[], object]]:
    return {name: partial(_decode, reader, _read(reader, before), count) for name, reader in readers.items()}


@torch.no_grad()
def _read(reader: Reader, before: int) -> SleepCache:
    """The cache after a window and `before` tokens of the next."""
    return reader.model(_prompt(WINDOW + before), logits_to_keep=1, passes=reader.passes)[CACHE_NAME]


@torch.no_grad()
def _decode(reader: Reader, start: SleepCache, count: int) -> None:
    cache, token = start.copy(), torch.zeros(1, 1, dtype=torch.long)
    for _ in range(count):
        logits = reader.model(token, cache=cache, passes=reader.passes).logits
        token = logits[:, -1:].argmax(-1)


def _blocks_of_a_sleep(reader: Reader) -> int:
    """The blocks that run after the token that fills a window."""
    cache, ran = _read(reader, WINDOW - 1), list[object]()
    blocks = [block for block in reader.model.modules() if isinstance(block, Block)]
    hooks = [block.register_forward_hook(lambda block, *_: ran.append(block)) for block in blocks]
    _decode(reader, cache, 1)
    for hook in hooks:
        hook.remove()
    return len(ran) - len(blocks)


def _memory_rows(model: SleepForCausalLM, quick: bool) -> list[Row]:
    lengths, rows = (SHORT, LONG // (8 if quick else 1)), list[Row]()
    kept, peak = zip(*(_memory(model, length) for length in lengths), strict=True)
    for name, mib in (("kept", kept), ("reading", peak)):
        rows += [
            Row(f"{name}, {length} tokens", value / 2**20, "MiB", better="lower")
            for length, value in zip(lengths, mib, strict=True)
        ]
        rows.append(Row(f"{name}, {lengths[1]} tokens against {SHORT}", mib[1] / mib[0], "x", 1.05, "lower"))
    return rows


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
