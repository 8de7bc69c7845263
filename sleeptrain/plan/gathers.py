"""How often ZeRO-3 gathers each weight in a step, found by going through a step's uses as DeepSpeed does.

DeepSpeed gathers a weight when its module runs, forward or backward, and drops it afterwards, unless the module runs
again before so many other elements have been used (`limits.MAX_REUSE`). It looks ahead so where a step repeats the
two before it; where the rounds of steps differ it drops every weight, and gathers more than is said here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sleeptrain.config.schema import Config
from sleeptrain.model.mixers.registry import block_spec
from sleeptrain.parallel.zero import limits
from sleeptrain.plan.parameters import Held
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.rounds import Round, windows_of

_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EMBEDDING = "embedding.weight"
# What `parallel.zero` keeps from the forward to the step: all that is no matrix of a linear layer, and the head.
_KEPT = ""


@dataclass(frozen=True)
class _Use:
    """A module runs. forward: or it is its backward. rerun: its forward has run again meanwhile, on the same weight."""

    name: str
    forward: bool
    rerun: bool = False


def gathered(config: Config, workload: Workload, held: Sequence[Held]) -> int:
    """The elements that the replicas gather in a step like the one before, padding included.

    Parameters of at most `limits.PERSISTENT` elements are gathered once, after the update.
    """
    sizes = {h.name: h.numel for h in held}
    padded = {name: -(-size // workload.replicas) * workload.replicas for name, size in sizes.items()}
    small = {name for name, size in sizes.items() if size <= limits.PERSISTENT}
    uses = list(_uses(config, workload))
    kept = sizes.keys() - {use.name for use in uses}
    for layer in range(len(config.model.layers)):  # what a block uses besides counts for the distance alone
        sizes[f"blocks.{layer}"] = sum(sizes[name] for name in kept if name.startswith(f"blocks.{layer}."))
        padded[f"blocks.{layer}"] = 0
    sizes[_KEPT] = sum(sizes[name] for name in kept)
    padded[_KEPT] = sum(padded[name] for name in kept - small)
    gathers = _count(uses, sizes)
    return sum(padded[name] for name in small) + sum(
        padded[n] * times for n, times in gathers.items() if n not in small
    )


def _count(uses: Sequence[_Use], sizes: dict[str, int]) -> dict[str, int]:
    """How often each weight is gathered. sizes: elements of all that is used."""
    before = [0, *accumulate(sizes[use.name] for use in uses)]  # elements used before each use
    following = _following(uses)
    there, waiting, found = set[str](), dict[str, int](), dict.fromkeys((use.name for use in uses), 0)
    for i, use in enumerate(uses):
        if use.name not in there:
            found[use.name] += 1
            there.add(use.name)
        # DeepSpeed drops a weight after the backward of its last forward; after those of forwards before it does not.
        waiting[use.name] = 1 if use.forward else 0 if use.rerun else waiting[use.name] - 1
        again = following[i]
        reused = again is not None and before[again] - before[i + 1] < limits.MAX_REUSE
        drops = use.forward or (waiting[use.name] == 0 and use.name not in (_EMBEDDING, _KEPT))
        if drops and not reused:
            there.discard(use.name)
    return found


def _following(uses: Sequence[_Use]) -> list[int | None]:
    """For each use, the next one of the same module."""
    found: list[int | None] = [None] * len(uses)
    latest: dict[str, int] = {}
    for i in reversed(range(len(uses))):
        found[i] = latest.get(uses[i].name)
        latest[uses[i].name] = i
    return found


def _uses(config: Config, workload: Workload) -> Iterator[_Use]:
    """Of a step: all forwards, then backwards with what runs again for them. ZeRO-3 takes one backward a step."""
    for r in workload.rounds:
        yield from _forward(config, workload, r)
    yield _Use(_KEPT, True)
    yield _Use(_KEPT, False)
    mode, trained = config.sleep.recompute, workload.trained(1)
    for group in reversed(windows_of(trained)):
        if mode == "window":
            for r in group[:-1]:
                yield from _forward(config, workload, r)
        for r in reversed(group):
            yield from _backward(config, workload, r, mode)


def _forward(config: Config, workload: Workload, r: Round) -> Iterator[_Use]:
    if r.is_wake and not config.model.tie_embeddings:
        yield _Use(_EMBEDDING, True)
    for layer, state_only in _blocks(config, workload, r):
        yield _Use(f"blocks.{layer}", True)
        yield from (_Use(name, True) for name in _calls(config, layer, state_only))


def _backward(config: Config, workload: Workload, r: Round, mode: str) -> Iterator[_Use]:
    """Of a round, with what runs again for it: all of it at once, or each block before its own backward.

    The last linear layer finds its weight there: it was gathered for the backward that made the rest run again. Where
    more comes after that layer, this is what made it run again.
    """
    needs_last = config.model.sandwich_norms
    again = list(_forward(config, workload, r)) if mode in ("pass", "window") else []
    finds = bool(again) and not (r.loss or r.state_only or needs_last or config.model.norm_between_passes)
    yield from again[:-1] if finds else again
    for layer, state_only in reversed(list(_blocks(config, workload, r))):
        names = _calls(config, layer, state_only)
        yield _Use(f"blocks.{layer}", False)
        if mode == "block":
            finds = not state_only and not needs_last
            yield from (_Use(name, True) for name in (names[:-1] if finds else names))
        yield _Use(names[-1], False, rerun=finds)
        yield from (_Use(name, False) for name in reversed(names[:-1]))
        finds = False
    if r.is_wake and not config.model.tie_embeddings:
        yield _Use(_EMBEDDING, False)


def _blocks(config: Config, workload: Workload, r: Round) -> Iterator[tuple[int, bool]]:
    """(number, whether only its state counts) of the blocks that a round runs."""
    planned = workload.layers_of(r, config)
    return ((i, r.state_only and i == planned.stop - 1) for i in planned)


def _calls(config: Config, layer: int, state_only: bool) -> list[str]:
    """The weights of a block's linear layers, as they are called."""
    spec = block_spec(config.model, layer)
    names = [f"mixer.{name}" for name in (*spec.state_layers, *(() if state_only else spec.feature_layers))]
    names += () if state_only or layer in config.model.mixer_only else _MLP
    return [f"blocks.{layer}.{name}.weight" for name in names]
