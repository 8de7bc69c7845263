"""The cost of the optimizer's step. Each of Muon's matrices is updated by one owner among a stage's processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sleeptrain.config.schema import Config
from sleeptrain.parallel.zero.matrix_exchange import assign_owners, newton_schulz_cost
from sleeptrain.plan.parameters import Held, overlaps, role_groups

NEWTON_SCHULZ_STEPS = 5  # of `sleeptrain.optim.muon.newton_schulz`
FLOPS_OF_A_MULTIPLICATION = 2


def newton_schulz_flops(config: Config, held: Sequence[Held], replicas: int) -> float:
    """FLOPs of Newton-Schulz on the process with the most work."""
    loads = [0.0] * (config.parallel.tensor * replicas)
    for group in _muon_groups(held, config.parallel.zero):
        costs = _costs(group)
        for name, owner in assign_owners(costs, len(loads)).items():
            loads[owner] += costs[name]
    return FLOPS_OF_A_MULTIPLICATION * NEWTON_SCHULZ_STEPS * max(loads)


def muon_exchange(config: Config, held: Sequence[Held], replicas: int) -> int:
    """Elements that the busiest process sends: its fragments to the owners, and its own matrices back to the others."""
    tensor, zero = config.parallel.tensor, config.parallel.zero
    sent = [0] * (tensor * replicas)
    for group in _muon_groups(held, zero):
        owners = assign_owners(_costs(group), len(sent))
        for h in group:
            copies = replicas - 1 if zero == 0 else tensor
            sent[owners[h.name]] += h.numel * copies
        if zero == 0:
            continue  # every process holds the full matrices: nothing is sent to an owner
        pieces = _equal_parts(group, replicas) if zero == 3 else overlaps(group, replicas)
        for rank in range(len(sent)):  # neighbouring ranks are tensor ranks
            for h, inside in pieces[rank // tensor]:
                sent[rank] += -inside if owners[h.name] == rank else inside
    return max(sent)


def _muon_groups(held: Sequence[Held], zero: int) -> list[list[Held]]:
    return [group for group in role_groups(held, zero) if group[0].role.kind == "muon"]


def _costs(group: Sequence[Held]) -> Mapping[str, float]:
    return {h.name: newton_schulz_cost(h.shape, h.role.blocks) for h in group}


def _equal_parts(group: Sequence[Held], replicas: int) -> list[list[tuple[Held, int]]]:
    """As `overlaps`, for ZeRO-3, which cuts each parameter by itself."""
    parts = [(h, -(-h.numel // replicas)) for h in group]
    return [[(h, max(0, min(part, h.numel - i * part))) for h, part in parts] for i in range(replicas)]
