"""The layout of the tasks' rows, and the windows that fit it."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import DataConfig, DepoConfig, GsmInfiniteConfig, Rule110Config
from sleeptrain.config.task_rows import check_task, depo_rows, row_length, rule110_rows, targets_share
from sleeptrain.errors import ConfigError

RULE110 = DataConfig(source="rule110", rule110=Rule110Config(width=6, strings=3))
DEPO = DataConfig(source="depo", depo=DepoConfig(nodes=10, min_nodes=3, max_word=2, queries=4))
SPREAD = DataConfig(source="depo", depo=DepoConfig(nodes=10, min_nodes=3, max_word=2, queries=4, windows=2))
GSM = DataConfig(source="gsm_infinite", gsm_infinite=GsmInfiniteConfig(min_tokens=30, max_tokens=40))


def test_rows_are_the_context_and_then_the_answers() -> None:
    strings, edges = rule110_rows(RULE110.rule110), depo_rows(DEPO.depo)
    assert (strings.context, strings.answers, strings.targets, strings.sequence) == (18, 3, 3, 21)
    assert (edges.context, edges.answers, edges.targets, edges.sequence) == (40, 24, 12, 64)
    assert strings.named == "data.rule110.width (6) x data.rule110.strings (3)"


@pytest.mark.parametrize(
    ("data", "length", "share"),
    [(RULE110, 21, 3 / 21), (DEPO, 64, 12 / 64), (GSM, 40, 4 / 40), (DataConfig(sequence=77), 77, 1.0)],
    ids=["rule110", "depo", "gsm_infinite", "shards"],
)
def test_lengths_and_targets(data: DataConfig, length: int, share: float) -> None:
    assert (row_length(data), targets_share(data)) == (length, share)


@pytest.mark.parametrize(
    ("data", "window"), [(RULE110, 6), (RULE110, 3), (RULE110, 21), (DEPO, 40), (DEPO, 64), (GSM, 1), (GSM, 40)]
)
def test_windows_that_fit_a_row(data: DataConfig, window: int) -> None:
    check_task(data, [("sleep.window", window)])


@pytest.mark.parametrize(
    ("data", "window", "message"),
    [
        (RULE110, 7, r"^sleep\.window \(7\) must divide the context of 18 tokens .*or be 21, the whole row"),
        (RULE110, 2, r"hold the 3 tokens of the answers"),
        (DEPO, 20, r"^sleep\.window \(20\) must .* hold the 24 tokens of the answers"),
        (SPREAD, 80, r"^sleep\.window \(80\) must be 40, .*each of data\.depo\.windows=2, .*or 104, the whole row"),
        (GSM, 41, r"^sleep\.window \(41\) is longer than data\.gsm_infinite\.max_tokens \(40\)"),
    ],
)
def test_windows_that_do_not_fit(data: DataConfig, window: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(data, [("sleep.window", window)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(source="rule110", rule110=Rule110Config(width=6, label=6)), r"label=6 must be less than .*width=6"),
        (DataConfig(source="depo", depo=DepoConfig(windows=1)), r"data\.depo\.windows=1 must be 0, or 2 and more"),
        (DataConfig(source="depo", depo=DepoConfig(nodes=3, min_nodes=4)), r"min_nodes=4 must not exceed .*nodes=3"),
        (
            DataConfig(source="depo", depo=DepoConfig(nodes=4, min_nodes=3, symbols=7, max_word=1)),
            r"symbols=7 and data\.depo\.max_word=1 make 7 words, too few to name data\.depo\.nodes=4",
        ),
        (
            DataConfig(source="gsm_infinite", gsm_infinite=GsmInfiniteConfig(min_ops=9)),
            r"min_ops=9 must not exceed data\.gsm_infinite\.max_ops=8",
        ),
        (
            DataConfig(source="gsm_infinite", gsm_infinite=GsmInfiniteConfig(validation="a")),
            r"train and data\.gsm_infinite\.validation must both be files, or both empty",
        ),
    ],
)
def test_settings_that_contradict_each_other(data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(data, [])
