from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest

from sleeptrain.config.schema import Config, CurriculumStage, DataConfig, SleepConfig, TrainConfig
from sleeptrain.sleep.curriculum import StepShape, shape_starts, stage_shape, step_shape

STAGES = [
    CurriculumStage(tokens=100, passes=2),
    CurriculumStage(tokens=200, passes=4, window=256),
    CurriculumStage(tokens=300, batch=16),
]


def config(**sleep: object) -> Config:
    return Config(
        sleep=SleepConfig(passes=1, window=128, **sleep), data=DataConfig(batch=8), train=TrainConfig(tokens=1)
    )


def test_each_stage_overrides_its_settings_from_its_tokens_on():
    made = config(curriculum=STAGES)
    expected = {
        0: StepShape(1, 128, 8),
        99: StepShape(1, 128, 8),
        100: StepShape(2, 128, 8),
        200: StepShape(4, 256, 8),
        10_000: StepShape(4, 256, 16),
    }
    assert {tokens: step_shape(made, tokens, 7) for tokens in expected} == expected


def test_sampled_passes_are_uniform_and_a_function_of_the_step():
    made = config(curriculum=[CurriculumStage(tokens=1, passes=4)], sample_passes=True)
    drawn = [step_shape(made, 1, step).passes for step in range(400)]
    assert drawn == [step_shape(made, 1, step).passes for step in range(400)]
    found = Counter(drawn)
    assert set(found) == {1, 2, 3, 4} and min(found.values()) > 60


def counts(made: Config, total: int) -> list[tuple[int, int]]:
    """(N, the number of tokens that train with it) in the order of a run."""
    passes = [step_shape(made, tokens, 0).passes for tokens in range(total)]
    return [(n, len(list(group))) for n, group in groupby(passes)]


def test_a_linear_ramp_holds_every_number_equally_long():
    made = config(
        curriculum=[CurriculumStage(tokens=100, passes=1), CurriculumStage(tokens=500, passes=4, ramp="linear")]
    )
    assert counts(made, 600) == [(1, 200), (2, 100), (3, 100), (4, 200)]
    down = config(
        curriculum=[CurriculumStage(tokens=1, passes=4), CurriculumStage(tokens=301, passes=2, ramp="linear")]
    )
    assert counts(down, 400) == [(1, 1), (4, 100), (3, 100), (2, 199)]


def test_a_sqrt_ramp_goes_by_one_minus_the_root():
    """N rises in three steps: where 1 - sqrt(1 - p) passes 1/4, 2/4 and 3/4, at p = 7/16, 12/16 and 15/16."""
    made = config(curriculum=[CurriculumStage(tokens=1600, passes=4, ramp="sqrt")])
    assert counts(made, 2000) == [(1, 700), (2, 500), (3, 300), (4, 500)]


def test_other_settings_jump_where_passes_ramp():
    made = config(
        curriculum=[
            CurriculumStage(tokens=100, passes=2, window=64, ramp="linear"),
            CurriculumStage(tokens=200, batch=4),
        ]
    )
    assert step_shape(made, 99, 0) == StepShape(2, 128, 8)
    assert step_shape(made, 100, 0) == StepShape(2, 64, 8)
    assert step_shape(made, 150, 0) == StepShape(2, 64, 8)


@pytest.mark.parametrize("ramp", ["linear", "sqrt", "step"])
@pytest.mark.parametrize("passes", [(1, 4, 2), (3, 3, 8), (1, 9, 9)])
def test_shape_starts_are_where_steps_change(ramp: str, passes: tuple[int, int, int]):
    stages = [
        CurriculumStage(tokens=97, passes=passes[1], ramp=ramp),
        CurriculumStage(tokens=240, passes=passes[2], ramp=ramp),
    ]
    made = config(curriculum=stages)
    made.sleep.passes = passes[0]
    shapes = [stage_shape(made, tokens) for tokens in range(400)]
    changes = {0, 97, 240, *(at for at in range(1, 400) if shapes[at] != shapes[at - 1])}
    assert shape_starts(made) == sorted(changes)
