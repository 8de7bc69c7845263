"""When and how the model sleeps."""

from __future__ import annotations

from dataclasses import dataclass

from sleeptrain.config.setting import setting

STOP_RULES = ("change", "acceleration", "gate")


@dataclass
class CurriculumStage:
    """One stage of the curriculum, in force from `tokens` seen on. An empty field keeps the last stage's value.

    ramp: whether N jumps to `passes` at `tokens`, or grows from the start of the stage before and reaches it there.
    """

    tokens: int = setting(0, "in force from this many tokens seen on", allowed=">= 0")
    passes: int | None = setting(None, "N; null keeps the value before", at_least=1)
    window: int | None = setting(None, "L", at_least=1)
    batch: int | None = setting(None, "rows of a step", at_least=1)
    ramp: str = setting(
        "step",
        "whether N jumps to `passes`, or grows to it from the stage before on ([training](training.md#curriculum))",
        choices=("step", "linear", "sqrt"),
    )


@dataclass
class SleepConfig:
    """When and how the model sleeps; `passes` counts the wake pass (N=1 never sleeps)."""

    passes: int = setting(1, "N, the wake pass counted", at_least=1)
    window: int = setting(128, "L, at most `data.sequence`; for a task see [windows](tasks.md#windows)", at_least=1)
    when: str = setting("every", "which windows sleep; shards need `every`", choices=("every", "unlabelled"))
    feedback: str = setting("features", "what a sleep pass reads", choices=("features", "none"))
    eviction: str = setting("hard", "what stays in the KV cache", choices=("hard", "sliding"), on_resume="fixed")
    conv_state: str = setting(
        "restart", "what the short convolutions see before a window", choices=("restart", "carry"), on_resume="fixed"
    )
    core: list[int] | None = setting(
        None, "the blocks of the loop; null is all. With N > 1 it must hold a recurrent layer", allowed="[first, last)"
    )
    stop: str = setting(
        "fixed",
        "what ends the sleep of a row before N passes, see [stop rules](method.md#stop-rules)",
        choices=("fixed", *STOP_RULES),
        on_resume="free",
    )
    stop_threshold: float = setting(
        0.0, "a row stops when the score of `sleep.stop` is at most this", at_least=0, on_resume="free"
    )
    stop_gate: str = setting(
        "", "the network of `sleep.stop=gate`", allowed="a file of `sleeptrain calibrate --fit-gate`", on_resume="free"
    )
    min_passes: int = setting(
        1,
        "passes that each row takes before a stop rule may end its sleep, the wake pass counted",
        at_least=1,
        on_resume="free",
    )
    sample_passes: bool = setting(False, "draw N uniformly from 1..N at each step")
    recompute: str = setting(
        "none",
        "what is computed again in the backward; `auto` chooses by the memory ([training](training.md#memory))",
        choices=("none", "selective", "block", "pass", "window", "auto"),
        on_resume="free",
    )
    bptt_windows: int | None = setting(
        None, "gradients flow through at most this many windows; null is all of a step", at_least=1
    )
    bptt_passes: int | None = setting(
        None, "gradients flow through at most this many last passes of a window's sleep; null is all", at_least=1
    )
    curriculum: list[CurriculumStage] = setting([], "see below; sorted by `tokens`", allowed="a list of stages")
