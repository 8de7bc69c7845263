"""The links of a job: which pairs are measured, and one slow link among local ranks."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from sleeptrain.doctor import links
from sleeptrain.doctor.links import measure, rounds
from sleeptrain.doctor.links_report import Links, warnings
from sleeptrain.errors import ConfigError
from tests.parallel.processes import run_ranks


@pytest.mark.parametrize("counts", [(2,), (3,), (8, 8), (4, 4, 4), (1,) * 40, (2, 1)])
def test_pairs_of_a_round_share_no_process_and_all_machines_are_met(counts: tuple[int, ...]) -> None:
    machines = [str(m) for m, count in enumerate(counts) for _ in range(count)]
    found = list(rounds(machines))
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks)), "in a round no rank has two"
    pairs = [pair for each in found for pair in each]
    assert len(pairs) == len(set(pairs))
    inside = {(a, b) for a, b in combinations(range(len(machines)), 2) if machines[a] == machines[b]}
    assert inside <= set(pairs)
    met = {frozenset((machines[a], machines[b])) for a, b in pairs} - {frozenset(m) for m in machines}
    if len(counts) <= links.ALL_PAIRS:
        assert len(met) == len(counts) * (len(counts) - 1) // 2
    else:
        assert len(found) == (len(counts) - 1).bit_length() and all(any(m in pair for pair in met) for m in machines)


def _measured() -> Links:
    """Three machines of one process each; ranks 1 and 2 have a slow link."""
    send = dist.send

    def slow(tensor: torch.Tensor, peer: int) -> None:
        if {dist.get_rank(), peer} == {1, 2}:
            time.sleep(0.2)
        send(tensor, peer)

    links.BOUNCES, links.SENDS, links.SUMS, dist.send = 3, 1, 1, slow  # type: ignore[assignment]
    return measure(torch.device("cpu"), "abc"[dist.get_rank()])


def test_a_slow_link_of_local_ranks_is_found() -> None:
    found, *others = run_ranks(_measured, 3, timeout=60)
    assert others == [found] * 2
    assert {(link.a, link.b) for link in found.pairs} == {(0, 1), (0, 2), (1, 2)}
    assert {(s.name, s.scope) for s in found.sums} == {("all_reduce", "over all"), ("reduce_scatter", "over all")}
    assert max(found.pairs, key=lambda link: link.latency)[:2] == (1, 2)
    assert any(line.startswith("between machines, rank 1 (b) and rank 2 (c): latency ") for line in warnings(found))


def test_one_process_has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with pytest.raises(ConfigError, match="start one for each GPU, by srun or torchrun"):
        links.measure_links()
