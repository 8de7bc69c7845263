"""What measured links say: medians, the slowest ones, and warnings where one is far from the median."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

# A link is warned of if its rate is below the median by this factor, or its latency above it by the other one, which is
# larger since small times vary more.
FAR_RATE, FAR_LATENCY = 2.0, 5.0
SHOWN = 8  # warnings of single links


class Link(NamedTuple):
    """A pair of ranks. latency: seconds of a small message. rate: bytes/s of a large one, in one direction."""

    a: int
    b: int
    latency: float
    rate: float


class Sum(NamedTuple):
    """A collective of `num_bytes` bytes. scope: `over all`, `inside machines`. seconds: of the slowest process."""

    name: str
    scope: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Links:
    """The links of a job. machines: that of each rank. left_out: pairs for which the time was not enough."""

    backend: str
    machines: list[str]
    pairs: list[Link]
    sums: list[Sum]
    left_out: int = 0

    def inside(self, link: Link) -> bool:
        return self.machines[link.a] == self.machines[link.b]

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.machines[rank]})"


@dataclass(frozen=True)
class _Figure:
    """One figure of links of one kind. factor: by how much a link is worse than the median, above 1 if it is."""

    what: str
    unit: str
    scale: float
    far: float
    attribute: str

    def value(self, link: Link) -> float:
        return float(getattr(link, self.attribute))

    def factor(self, link: Link, middle: float) -> float:
        return middle / self.value(link) if self.attribute == "rate" else self.value(link) / middle

    def text(self, value: float) -> str:
        number = value * self.scale
        return f"{number:,.0f} {self.unit}" if number >= 1000 else f"{number:.3g} {self.unit}"


FIGURES = (
    _Figure("latency", "us", 1e6, FAR_LATENCY, "latency"),
    _Figure("rate", "GB/s", 1e-9, FAR_RATE, "rate"),
)


def links_to_text(links: Links) -> str:
    num_machines = len(set(links.machines))
    machines = f"{num_machines} machine{'s' if num_machines > 1 else ''}"
    lines = [f"{len(links.machines)} processes on {machines}, {links.backend}"]
    for where, pairs in _kinds(links):
        for figure in FIGURES:
            middle, worst = _middle(figure, pairs), max(pairs, key=lambda p: figure.factor(p, _middle(figure, pairs)))
            between = f"{links.name(worst.a)} and {links.name(worst.b)}"
            lines.append(
                f"{where} machines: {figure.what} {figure.text(middle)} (median of {len(pairs)} pairs), the slowest "
                f"{figure.text(figure.value(worst))} between {between}"
            )
    for s in links.sums:
        if s.seconds:
            lines.append(
                f"{s.name} {s.scope}: {s.num_bytes / s.seconds / 1e9:.3g} GB/s of {s.num_bytes / 2**20:.0f} MiB"
            )
    if links.left_out:
        lines.append(f"{links.left_out} pairs were left out: the time was over")
    return "\n".join([*lines, *(f"warning: {line}" for line in warnings(links))])


def warnings(links: Links) -> list[str]:
    """Lines about machines all of whose links are slow, then about other links that are far from the median."""
    return [
        line for where, pairs in _kinds(links) for figure in FIGURES for line in _warnings(links, where, pairs, figure)
    ]


def links_to_json(links: Links) -> dict[str, Any]:
    return asdict(links) | {"pairs": [p._asdict() for p in links.pairs], "sums": [s._asdict() for s in links.sums],
                            "warnings": warnings(links)}  # fmt: skip


def _kinds(links: Links) -> Iterator[tuple[str, list[Link]]]:
    for where, inside in (("inside", True), ("between", False)):
        if pairs := [link for link in links.pairs if links.inside(link) is inside]:
            yield where, pairs


def _middle(figure: _Figure, pairs: Sequence[Link]) -> float:
    return median(figure.value(link) for link in pairs)


def _warnings(links: Links, where: str, pairs: Sequence[Link], figure: _Figure) -> Iterator[str]:
    middle = _middle(figure, pairs)
    of_machine: dict[str, list[Link]] = defaultdict(list)
    for link in pairs:
        for machine in {links.machines[link.a], links.machines[link.b]}:
            of_machine[machine].append(link)
    slow = set[str]()
    for machine, own in of_machine.items():
        factor = median(figure.factor(link, middle) for link in own)
        num_far = sum(figure.factor(link, middle) >= figure.far for link in own)
        if len(of_machine) > 2 and num_far > len(own) / 2:
            slow.add(machine)
            yield (
                f"{machine}: {figure.what} of its links {where} machines is {figure.text(_middle(figure, own))} in the "
                f"median, {factor:.1f} times worse than that of all ({figure.text(middle)}; warned of from "
                f"{figure.far:g} times on); leave the machine out or have it looked at"
            )
    others = [link for link in pairs if not {links.machines[link.a], links.machines[link.b]} & slow]
    far = sorted((link for link in others if figure.factor(link, middle) >= figure.far),
                 key=lambda link: -figure.factor(link, middle))  # fmt: skip
    for link in far[:SHOWN]:
        yield (
            f"{where} machines, {links.name(link.a)} and {links.name(link.b)}: {figure.what} "
            f"{figure.text(figure.value(link))}, {figure.factor(link, middle):.1f} times worse than the median "
            f"({figure.text(middle)}; warned of from {figure.far:g} times on)"
        )
    if len(far) > SHOWN:
        yield f"{where} machines: {len(far) - SHOWN} more pairs like these"
