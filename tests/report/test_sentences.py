"""The sentences of a page's first screen."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sleeptrain.report.curves import Band
from sleeptrain.report.sentences import (
    effects,
    in_nats,
    in_points,
    in_words,
    listed,
    passes,
    sentences,
    trained,
    troubles,
)
from tests.report.made import GUESSING, accuracy, evaluation, grid_runs, read_run, section_of, step

TEXT = ("experiment=stdlib", "sleep.curriculum=[]", "data.sequence=256", "model.vocab_size=300", "sleep.passes=4")


def ended(low: float, high: float, seeds: int = 2, steps: Sequence[int] = (10,)) -> Band:
    return Band(
        list(steps), None, [(low + high) / 2] * len(steps), [low] * len(steps), [high] * len(steps), seeds, seeds
    )


def text(at: int, asleep: float, awake: float) -> list[dict]:
    return [step(at, passes=4), evaluation(at, {"1": [3.0, awake], "4": [3.0, asleep]})]


def test_several_seeds_of_two_n() -> None:
    assert sentences(section_of(*(read_run(*run) for run in grid_runs()))) == [
        "A model (attention, Gated DeltaNet) on Rule 110 with 8 updates; two seeds of N=1 and N=2, all finished, "
        "10 steps.",
        "With two passes 85.0 % of held-out rows are right (80.0 to 90.0), with one pass 60.0 % (50.0 to 70.0): "
        "sleep adds 25.0 points. Guessing reaches 60.0 %.",
    ]


def test_one_run_is_compared_with_itself_kept_awake() -> None:
    settings = {"sleep.passes": 4, "data.rule110.steps": 1}
    section = section_of(read_run(settings, [step(1), accuracy(1, 0.9, 4, **GUESSING)]))
    section.runs[0].parameters = 116_324
    assert sentences(section) == [
        "116k parameters (attention, Gated DeltaNet) on Rule 110 with 1 update; one seed of N=4, finished, 1 step.",
        "With four passes 90.0 % of held-out rows are right, kept awake (one pass) 25.0 %: sleep adds 65.0 points "
        "(one seed, so its spread is not known). Guessing reaches 60.0 %.",
    ]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "No evaluation yet: what sleep does is not known."),
        ([accuracy(2, 0.75)], "With one pass 75.0 % of held-out rows are right; no pass of sleep was trained."),
    ],
)
def test_a_run_that_did_not_sleep_or_was_not_evaluated(records: list, expected: str) -> None:
    assert effects(section_of(read_run({}, [step(2), *records]))) == [expected]


def test_other_differences_than_n_give_a_sentence_each_and_many_a_count() -> None:
    settings = [{"sleep.passes": 2, "optim.muon_lr": float(number)} for number in range(1, 6)]
    section = section_of(*(read_run(values, [accuracy(3, 0.5, 2)]) for values in settings))
    assert effects(section) == ["5 sets of settings: their last values are in the table."]
    assert "one seed of 5 sets of settings, all finished" in trained(section)
    del section.groups[2:]
    [text] = effects(section)
    assert text.startswith("optim.muon_lr=1.0: 50.0 % of held-out rows are right, kept awake (one pass) 25.0 %: ")
    assert " optim.muon_lr=2.0: 50.0 % of held-out rows are right" in text


def test_each_difficulty_has_its_sentence_and_an_earlier_end_is_named() -> None:
    runs = []
    for t, n, ends in ((4, 1, (5, 10)), (4, 2, (5,)), (8, 1, (10,)), (8, 2, (5,))):
        records = [accuracy(end, 0.1 * n, n) for end in ends]
        runs.append(read_run({"data.rule110.steps": t, "sleep.passes": n}, records))
    section = section_of(*runs)
    assert "on Rule 110 with 4 and 8 updates; one seed of N=1 and N=2" in trained(section)
    assert effects(section) == [
        "t=4: At step 5, the last of both: with two passes 20.0 % of held-out rows are right, with one pass 10.0 %: "
        "sleep adds 10.0 points (one seed, so its spread is not known).",
        "t=8: With two passes and with one pass no step was evaluated in both.",
    ]


def test_failed_and_unfinished_runs_are_counted() -> None:
    states = ["finished", "failed", "failed", "running", "stopped", None]
    runs = [read_run({"train.seed": n}, [step(n, skipped=n // 5)], state) for n, state in enumerate(states)]
    section = section_of(*runs)
    assert "six seeds of N=1, one of six finished, 0 to 5 steps." in trained(section)
    assert troubles(section.runs) == [
        "Two runs FAILED.",
        "Two runs are not finished.",
        "The state of one run is not known.",
        "One run skipped steps: 1 in all.",
    ]
    assert troubles(section.runs[:1]) == []
    assert sentences(section)[1] == " ".join(troubles(section.runs))


def test_a_stop_rule_is_named_with_the_passes_that_it_took() -> None:
    stop = {"sleep.passes": 4, "sleep.stop": "change", "sleep.stop_threshold": 0.02}
    last = accuracy(2, 0.75, 4)
    last["eval"]["passes"] = {"4": 2.5}
    assert effects(section_of(read_run(stop, [step(2), last])))[-1] == (
        "A stop rule (change, threshold 0.02) may end a row's sleep before N passes: in the last evaluation after "
        "2.50 passes in the mean."
    )


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((0.5, 0.3), "sleep lowers it by 0.4000 (+0.3000 to +0.5000 over two seeds)."),
        ((0.5, -0.1), "no difference (-0.1000 to +0.5000 over two seeds)."),
        ((-0.2,), "sleep RAISES it by 0.2000 (one seed, so its spread is not known)."),
        ((0.0,), "no difference (one seed, so its spread is not known)."),
    ],
)
def test_text_says_the_loss_with_sleep_and_kept_awake(gains: tuple, expected: str) -> None:
    records = [text(5 + seed, 2.0 - gain, 2.0) for seed, gain in enumerate(gains)]
    section = section_of(*(read_run({"train.seed": n}, read, base=TEXT) for n, read in enumerate(records)))
    assert " on text; " in trained(section)
    mean = 2 - sum(gains) / len(gains)
    assert effects(section) == [
        f"With four passes the held-out loss of windows 2..K is {mean:.4f} nats a token, kept awake (one pass) 2.0000: "
        + expected
    ]


def test_a_difference_counts_where_the_ranges_of_the_seeds_do_not_touch() -> None:
    assert in_points(ended(0.8, 0.9), ended(0.5, 0.6), 10) == "sleep adds 30.0 points"
    assert in_points(ended(0.5, 0.6), ended(0.8, 0.9), 10) == "sleep takes 30.0 points away"
    assert in_points(ended(0.5, 0.7), ended(0.6, 0.9), 10) == "no difference beyond the spread of the seeds"
    assert in_points(ended(0.5, 0.5, seeds=1), ended(0.5, 0.5, seeds=1), 10) == "no difference"
    assert in_nats([0.00001], 1).startswith("no difference")


def test_numbers_and_lists_in_words() -> None:
    assert [in_words(n) for n in (0, 1, 12, 1300)] == ["no", "one", "twelve", "1,300"]
    assert [passes(n) for n in (1, 4)] == ["one pass", "four passes"]
    assert [listed(texts) for texts in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
