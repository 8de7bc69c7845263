"""What is said of measured links: even ones, a slow link, a slow machine."""

from __future__ import annotations

from itertools import combinations

from sleeptrain.doctor.links_report import Link, Links, Sum, links_to_text, warnings


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
