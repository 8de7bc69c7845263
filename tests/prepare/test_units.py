from __future__ import annotations

from pathlib import Path

from sleeptrain.prepare.inputs import Source
from sleeptrain.prepare.units import PACKED, plan_units


def source(name: str, size: int, kind: str = "text", compression: str = "") -> Source:
    return Source(Path(name), name, kind, compression, size, 0)


def layout(sources: list[Source], unit_bytes: int) -> list[list[tuple[str, int, int]]]:
    units = plan_units(sources, "text", unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    return [[(part.source.name, part.start, part.stop) for part in unit.slices] for unit in units]


def test_small_files_are_joined_in_order() -> None:
    files = [source("a", 40), source("b", 60), source("c", 1), source("empty", 0), source("d", 99)]
    assert layout(files, 100) == [[("a", 0, 40), ("b", 0, 60)], [("c", 0, 1), ("empty", 0, 0), ("d", 0, 99)]]


def test_large_files_are_cut_where_the_format_allows_it() -> None:
    assert layout([source("text", 250)], 100) == [[("text", 0, 250)]]
    cut = [[("lines", 0, 100)], [("lines", 100, 200)], [("lines", 200, 250), ("next", 0, 50)]]
    assert layout([source("lines", 250, "lines"), source("next", 50, "json")], 100) == cut
    packed = source("packed", 250, "json", "gzip")
    assert layout([packed, source("small", 1)], 100) == [[("packed", 0, 250)], [("small", 0, 1)]]
    assert plan_units([packed], "text", 100)[0].weight == PACKED * 250


def test_no_input_gives_no_unit() -> None:
    assert layout([], 100) == layout([source("empty", 0, "json")], 100) == []


def test_a_unit_is_named_by_its_files() -> None:
    one, two = plan_units([source("a", 100), source("b", 10), source("c", 10)], "text", 100)
    assert (one.label, two.label) == ("unit 0 (a)", "unit 1 (b to c)")
