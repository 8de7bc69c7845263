"""The links of a job: which pairs are measured, what is said of them, and one slow link among local ranks."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

from sleeptrain.doctor import links
from sleeptrain.doctor.links import measure, rounds
from sleeptrain.doctor.links_report import Link, Links, Sum, links_to_text, warnings
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


def job(slow: dict[tuple[int, int], float]) -> Links:
    """Four machines of one process. slow: factors of links."""
    pairs = [Link(a, b, 1e-5 * slow.get((a, b), 1), 1e9 / slow.get((a, b), 1)) for a, b in combinations(range(4), 2)]
    return Links("gloo", list("abcd"), pairs, [Sum("all_reduce", "over all", 2**22, 0.01)])


def test_even_links_are_no_warning() -> None:
    assert warnings(job({(0, 1): 1.9})) == []
    assert "all_reduce over all: 0.419 GB/s of 4 MiB" in links_to_text(job({}))


def test_one_slow_link_is_named_with_its_ratio() -> None:
    (line,) = warnings(job({(1, 3): 4}))
    assert line.startswith(
        "between machines, rank 1 (b) and rank 3 (d): rate 0.25 GB/s, 4.0 times worse than the median"
    )
    assert "the slowest 0.25 GB/s between rank 1 (b) and rank 3 (d)" in links_to_text(job({(1, 3): 4}))


def test_a_machine_with_slow_links_is_named_once() -> None:
    lines = warnings(job({(0, 2): 3, (1, 2): 3, (2, 3): 3.5}))
    assert len(lines) == 1 and lines[0].startswith("c: rate of its links between machines is 0.333 GB/s in the median")


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
