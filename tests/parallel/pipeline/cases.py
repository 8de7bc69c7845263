"""Round plans and stages for the tests of the schedule."""

from __future__ import annotations

from hypothesis import strategies as st

from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.sleep.rounds import Round, WindowFacts, plan_rounds

LENGTH = 4  # tokens of a window


def plan(windows: int, passes: int, feedback: str = "features", goes_on: bool = False) -> list[Round]:
    """One row of `windows` windows with targets; all sleep but the last (with `goes_on`, the last too)."""
    read_later = [True] * (windows - 1) + [goes_on]
    facts = [WindowFacts(i * LENGTH, (i + 1) * LENGTH, (True,), (read_later[i],)) for i in range(windows)]
    return plan_rounds(facts, passes, "every", feedback)


def even_stages(
    num_stages: int, each: int = 2, core: tuple[int, int] | None = None, split_head: bool = False
) -> PipelineStages:
    """Stages of `each` recurrent layers."""
    num_layers = num_stages * each
    bounds, layers = tuple(range(0, num_layers + 1, each)), ("gated_deltanet",) * num_layers
    return PipelineStages(bounds, layers, core or (0, num_layers), split_head=split_head)


@st.composite
def any_stages(draw: st.DrawFn) -> PipelineStages:
    """1 to 4 stages of unequal sizes, layers of both sorts, any core, either eviction, a head on one or all stages."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    bounds = tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))
    layers = draw(st.lists(st.sampled_from(["attention", "gated_deltanet"]), min_size=bounds[-1], max_size=bounds[-1]))
    first = draw(st.integers(0, bounds[-1] - 1))
    last = draw(st.integers(first + 1, bounds[-1]))
    split_head = len(sizes) > 1 and draw(st.booleans())
    return PipelineStages(bounds, tuple(layers), (first, last), draw(st.booleans()), split_head)


@st.composite
def any_plans(draw: st.DrawFn) -> list[list[Round]]:
    """1 to 6 sequences of one step: N, policy and feedback are equal, targets and documents differ by row."""
    passes = draw(st.integers(1, 4))
    when, feedback = draw(st.sampled_from(["every", "unlabelled"])), draw(st.sampled_from(["features", "none"]))
    num_rows = draw(st.integers(1, 2))
    booleans = st.tuples(*[st.booleans()] * num_rows)
    window = st.tuples(booleans, booleans)
    plans = []
    for windows in draw(st.lists(st.lists(window, min_size=1, max_size=4), min_size=1, max_size=6)):
        facts = [WindowFacts(i * LENGTH, (i + 1) * LENGTH, *window) for i, window in enumerate(windows)]
        plans.append(plan_rounds(facts, passes, when, feedback))
    return plans
