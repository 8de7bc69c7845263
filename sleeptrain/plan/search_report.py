"""The layouts of a search as a text table, and as one JSON object (docs/plan.md lists its keys)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sleeptrain.plan.recompute import SHARE
from sleeptrain.plan.report import gib, table
from sleeptrain.plan.search import Found, Search
from sleeptrain.plan.speed import ASSUMPTIONS


def search_to_json(search: Search, processes: int, gpu: str) -> dict[str, Any]:
    """Sizes in bytes, shares 0..1."""
    return {
        "processes": processes,
        "gpu": gpu,
        "layouts": [_layout(found) for found in search.best],
        "refused": dict(search.refused.most_common()),
        "too_large": search.too_large,
        "slower": search.slower,
        "forecast": search.forecast,
        "assumptions": list(ASSUMPTIONS),
    }


def _layout(found: Found) -> dict[str, Any]:
    return {
        "settings": found.settings.split(),
        "modes": list(found.modes),
        "hours": found.hours,
        "mfu": found.mfu,
        "memory": found.memory,
        "compute": found.compute,
        "bubble": found.bubble,
        "links": found.links,
        "limit": found.limit,
    }


def search_to_text(search: Search, processes: int, gpu: str) -> str:
    return "\n".join(_lines(search, processes, gpu))


def _lines(search: Search, processes: int, gpu: str) -> Iterator[str]:
    yield f"the fastest layout of each way to cut the model over {processes} {gpu}; shares are of the run's time"
    rows = [
        [
            f"{f.hours:.3g}", f"{f.mfu:.1%}", gib(f.memory), f"{f.compute:.0%}", f"{f.bubble:.0%}", f"{f.links:.0%}",
            f.limit, f.settings,
        ]
        for f in search.best
    ]  # fmt: skip
    names = ["hours", "MFU", "GiB", "compute", "bubble", "links", "limited by", "what"]
    yield from table(names, rows)
    yield (
        f"{search.forecast} layouts forecast, {search.slower} cannot be among these, {search.too_large} need more than "
        f"{SHARE:.0%} of a GPU's memory"
    )
    yield f"refused, as a start would: {sum(search.refused.values())}"
    yield from (f"  {times:>6}  {reason}" for reason, times in search.refused.most_common())
    yield "assumed:"
    yield from (f"  {line}" for line in ASSUMPTIONS)
