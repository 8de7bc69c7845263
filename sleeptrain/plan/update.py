"""What the optimizer's step costs: Muon's matrices are spread over a stage's processes, each whole with one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sleeptrain.config.schema import Config
from sleeptrain.parallel.zero.matrix_exchange import assign_owners, newton_schulz_cost
from sleeptrain.plan.parameters import Held, overlaps, role_groups

NEWTON_SCHULZ_STEPS = 5  # of `sleeptrain.optim.muon.newton_schulz`
FLOPS_OF_A_MULTIPLICATION = 2


def newton_schulz_flops(config: Config, held: Sequence[Held], replicas: int) -> float:
    """Of the process that has most to orthogonalise."""
    loads = [0.0] * (config.parallel.tensor * replicas)
    for group in _muon_groups(held):
        costs = _costs(group)
        for name, owner in assign_owners(costs, len(loads)).items():
            loads[owner] += costs[name]
    return FLOPS_OF_A_MULTIPLICATION * NEWTON_SCHULZ_STEPS * max(loads)


def muon_exchange(config: Config, held: Sequence[Held], replicas: int) -> int:
    """The elements that leave the busiest process: its fragments of others' matrices, and all but its own of its."""
    tensor, zero = config.parallel.tensor, config.parallel.zero
    sent = [0] * (tensor * replicas)
    for group in _muon_groups(held):
        owners = assign_owners(_costs(group), len(sent))
        for h in group:
            copies = replicas - 1 if zero == 0 else tensor
            sent[owners[h.name]] += h.numel * copies
        if zero == 0:
            continue  # every process holds all: nothing travels to an owner
        pieces = _equal_parts(group, replicas) if zero == 3 else overlaps(group, replicas)
        for rank in range(len(sent)):  # tensor ranks are neighbours
            for h, inside in pieces[rank // tensor]:
                sent[rank] += -inside if owners[h.name] == rank else inside
    return max(sent)


def _muon_groups(held: Sequence[Held]) -> list[list[Held]]:
    return [group for group in role_groups(held) if group[0].role.kind == "muon"]


def _costs(group: Sequence[Held]) -> Mapping[str, float]:
    return {h.name: newton_schulz_cost(h.whole, h.role.blocks) for h in group}


def _equal_parts(group: Sequence[Held], replicas: int) -> list[list[tuple[Held, int]]]:
    """Under ZeRO-3 each parameter is cut by itself: for each replica, the elements that it holds."""
    parts = [(h, -(-h.numel // replicas)) for h in group]
    return [[(h, max(0, min(part, h.numel - i * part))) for h, part in parts] for i in range(replicas)]
