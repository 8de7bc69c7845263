"""Count how often ZeRO-3 gathers each weight in a step, by a simulation of DeepSpeed over the step's module runs.

DeepSpeed gathers a weight when its module runs, forward or backward. Afterwards it drops the weight, unless the module
runs again before `limits.MAX_REUSE` other elements are used. It can look ahead only if a step repeats the last two
steps. If their rounds differ, it drops every weight, and gathers more often than counted here.
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
# Stands for the weights that `parallel.zero` keeps from the forward to the step: all except matrices of linear layers,
# and the head.
_RESIDENT = ""


@dataclass(frozen=True)
class _Use:
    """One run of a module.

    name: its weight. forward: a forward; else a backward. rerun: the forward has run again since, on the same weight.
    """

    name: str
    forward: bool
    rerun: bool = False


@dataclass(frozen=True)
class Gathered:
    """What ZeRO-3 gathers in a step. elements: with padding. times: gathers of a weight that does not stay."""

    elements: int
    times: int


def gathered(config: Config, workload: Workload, held: Sequence[Held]) -> Gathered:
    """What the replicas gather in a step that repeats the last steps.

    Parameters of at most `limits.PERSISTENT` elements are gathered once, after the update.
    """
    sizes = {h.name: h.numel for h in held}
    padded = {name: -(-size // workload.replicas) * workload.replicas for name, size in sizes.items()}
    small = {name for name, size in sizes.items() if size <= limits.PERSISTENT}
    uses = list(_uses(config, workload))
    resident = sizes.keys() - {use.name for use in uses}
    for layer in range(len(config.model.layers)):  # a block's other weights count only for the reuse distance
        sizes[f"blocks.{layer}"] = sum(sizes[name] for name in resident if name.startswith(f"blocks.{layer}."))
        padded[f"blocks.{layer}"] = 0
    sizes[_RESIDENT] = sum(sizes[name] for name in resident)
    padded[_RESIDENT] = sum(padded[name] for name in resident - small)
    gathers = {name: times for name, times in _count(uses, sizes).items() if padded[name] and name not in small}
    elements = sum(padded[name] for name in small) + sum(padded[name] * times for name, times in gathers.items())
    return Gathered(elements, sum(gathers.values()))


def _count(uses: Sequence[_Use], sizes: dict[str, int]) -> dict[str, int]:
    """How often each weight is gathered. sizes: elements by name."""
    offsets = [0, *accumulate(sizes[use.name] for use in uses)]  # elements used before each use
    following = _following(uses)
    present, waiting, counts = set[str](), dict[str, int](), dict.fromkeys((use.name for use in uses), 0)
    for i, use in enumerate(uses):
        if use.name not in present:
            counts[use.name] += 1
            present.add(use.name)
        # DeepSpeed drops a weight after the backward of its last forward, not after the backward of an earlier one.
        waiting[use.name] = 1 if use.forward else 0 if use.rerun else waiting[use.name] - 1
        next_use = following[i]
        reused = next_use is not None and offsets[next_use] - offsets[i + 1] < limits.MAX_REUSE
        drops = use.forward or (waiting[use.name] == 0 and use.name not in (_EMBEDDING, _RESIDENT))
        if drops and not reused:
            present.discard(use.name)
    return counts


def _following(uses: Sequence[_Use]) -> list[int | None]:
    """For each use, the index of the next use of the same module."""
    following: list[int | None] = [None] * len(uses)
    latest: dict[str, int] = {}
    for i in reversed(range(len(uses))):
        following[i] = latest.get(uses[i].name)
        latest[uses[i].name] = i
    return following


def _uses(config: Config, workload: Workload) -> Iterator[_Use]:
    """The uses of a step: all forwards, then backwards with the forwards that they rerun. ZeRO-3 has one backward."""
    for r in workload.rounds:
        yield from _forward(config, workload, r)
    yield _Use(_RESIDENT, True)
    yield _Use(_RESIDENT, False)
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
    """The uses of a round's backward, with the forwards that it reruns: the whole round first, or block by block.

    The backward of the last linear layer gathers its weight and then starts the rerun, which finds this weight. If the
    round has an operation after that layer, the operation starts the rerun instead.
    """
    needs_last = config.model.sandwich_norms
    rerun = list(_forward(config, workload, r)) if mode in ("pass", "window") else []
    after_last = workload.selects_targets(r) or r.state_only or needs_last or config.model.norm_between_passes
    weight_present = bool(rerun) and not after_last
    yield from rerun[:-1] if weight_present else rerun
    for layer, state_only in reversed(list(_blocks(config, workload, r))):
        names = _calls(config, layer, state_only)
        yield _Use(f"blocks.{layer}", False)
        if mode == "block":
            weight_present = not state_only and not needs_last
            yield from (_Use(name, True) for name in (names[:-1] if weight_present else names))
        yield _Use(names[-1], False, rerun=weight_present)
        yield from (_Use(name, False) for name in reversed(names[:-1]))
        weight_present = False
    if r.is_wake and not config.model.tie_embeddings:
        yield _Use(_EMBEDDING, False)


def _blocks(config: Config, workload: Workload, r: Round) -> Iterator[tuple[int, bool]]:
    """(layer, state_only) of each block that a round runs. state_only: the block only updates its state."""
    layers = workload.layers_of(r, config)
    return ((i, r.state_only and i == layers.stop - 1) for i in layers)


def _calls(config: Config, layer: int, state_only: bool) -> list[str]:
    """The weights of a block's linear layers, in the order in which the layers run."""
    spec = block_spec(config.model, layer)
    names = [f"mixer.{name}" for name in (*spec.state_layers, *(() if state_only else spec.feature_layers))]
    names += () if state_only or layer in config.model.mixer_only else _MLP
    return [f"blocks.{layer}.{name}.weight" for name in names]
