"""The tables of docs/pipeline.md equal the results of the simulator."""

from __future__ import annotations

from pathlib import Path

from sleeptrain.parallel.pipeline.schedule import schedule
from sleeptrain.parallel.pipeline.simulate import Simulation, simulate
from sleeptrain.parallel.pipeline.task_costs import Costs
from tests.parallel.pipeline.cases import LENGTH, even_stages, plan

PAGE = Path(__file__).resolve().parents[3] / "docs" / "pipeline.md"


def rows(first_line: str) -> list[list[str]]:
    """The cells of the table with this header."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(first_line) + 2
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop]]


def cells(simulation: Simulation) -> list[str]:
    return [f"{simulation.bubble:.1%}", str(max(simulation.peak_live_rounds))]


def test_the_ring():
    header = (
        "| p | m | K | N | R | bubble | live | bubble per pass | live per pass | bubble whole micro-batches "
        "| live whole micro-batches |"
    )
    table = rows(header)
    assert len(table) == 18
    for *numbers, bubble, live, per_pass, live_per_pass, grouped, live_grouped in table:
        p, m, K, N, R = map(int, numbers)
        plans, stages = [plan(K, N)] * m, even_stages(p)
        assert len(plans[0]) == R
        assert [bubble, live] == cells(simulate(schedule(plans, stages)))
        assert [per_pass, live_per_pass] == [f"{(p - 1) / m:.1%}", str(min(m, p) if R == 1 else m * R)]
        assert [grouped, live_grouped] == cells(simulate(schedule(plans, stages, max_live_micro_batches=1)))


def test_without_feedback():
    for *numbers, bubble, live, grouped, live_grouped in rows(
        "| p | m | R | bubble | live | bubble whole micro-batches | live whole micro-batches |"
    ):
        p, m, R = map(int, numbers)
        assert [bubble, live] == cells(simulate(schedule([plan(4, 4, "none")] * m, even_stages(p))))
        assert [grouped, live_grouped] == [f"{(p - 1) / m:.1%}", str(min(m, p) * R)]


def test_too_few_micro_batches():
    for m, bubble, bound, live in rows("| m | bubble | (p - 1) / (m R) | live |"):
        assert [bubble, live] == cells(simulate(schedule([plan(4, 4)] * int(m), even_stages(4))))
        assert bound == f"{3 / (int(m) * 13):.1%}"


def test_how_many_sequences_are_alive():
    for limit, *bubbles, live in rows("| max_live_micro_batches | bubble, 0 | bubble, 0.1 | bubble, 0.5 | live |"):
        made = schedule([plan(4, 4)] * 16, even_stages(4), max_live_micro_batches=int(limit))
        forward = 2 * LENGTH  # layers of a stage, tokens
        late = [simulate(made, Costs(message=share * forward)) for share in (0, 0.1, 0.5)]
        assert bubbles == [cells(s)[0] for s in late]
        assert live == cells(late[0])[1]
