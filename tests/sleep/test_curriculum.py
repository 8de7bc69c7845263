from __future__ import annotations

from collections import Counter

from sleeptrain.config.schema import Config, DataConfig, SleepConfig, Stage, TrainConfig
from sleeptrain.sleep.curriculum import StepShape, step_shape

STAGES = [Stage(tokens=100, passes=2), Stage(tokens=200, passes=4, window=256), Stage(tokens=300, batch=16)]


def config(**sleep: object) -> Config:
    return Config(
        sleep=SleepConfig(passes=1, window=128, **sleep), data=DataConfig(batch=8), train=TrainConfig(tokens=1)
    )


def test_each_stage_overrides_what_it_names_from_its_tokens_on():
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
    made = config(curriculum=[Stage(tokens=1, passes=4)], sample_passes=True)
    drawn = [step_shape(made, 1, step).passes for step in range(400)]
    assert drawn == [step_shape(made, 1, step).passes for step in range(400)]
    counts = Counter(drawn)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 60
