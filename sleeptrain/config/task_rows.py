"""The layout of the tasks' rows, computed from their settings, and checks of these settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleeptrain.config.schema import DataConfig, DepoConfig, GsmInfiniteConfig, Rule110Config
from sleeptrain.config.schema.data import MOST_OPERATIONS
from sleeptrain.errors import ConfigError


@dataclass(frozen=True)
class TaskRows:
    """The layout of a task's row: the context, then the answers.

    context: tokens of the context, which have no target.
    answers: tokens after the context.
    targets: targets of a row, at most.
    named: the settings that determine the context, with their values, for messages.
    """

    context: int
    answers: int
    targets: int
    named: str

    @property
    def sequence(self) -> int:
        return self.context + self.answers


def rule110_rows(config: Rule110Config) -> TaskRows:
    """With `mixed_steps` a token before each string tells the number of updates."""
    steps_ids = 1 if config.mixed_steps else 0
    width = f"(data.rule110.width + 1) ({config.width + 1})" if steps_ids else f"data.rule110.width ({config.width})"
    named = f"{width} x data.rule110.strings ({config.strings})"
    return TaskRows(config.strings * (steps_ids + config.width), config.strings, config.strings, named)


def depo_rows(config: DepoConfig) -> TaskRows:
    """An edge has two words; a question has a hop count, a word, the marker of the answer and a word.

    With `windows` each has room for twice its mean share of the edges, so that few and many may fall into it.
    """
    word, edges = config.max_word, config.nodes
    named = f"2 x data.depo.nodes ({config.nodes}) x data.depo.max_word ({config.max_word})"
    if config.windows:
        edges = config.windows * depo_window_edges(config)
        named = f"data.depo.windows ({config.windows}) x {2 * depo_window_edges(config) * word}"
    context = 2 * edges * word
    return TaskRows(context, config.queries * (2 + 2 * word), config.queries * (1 + word), named)


def depo_window_edges(config: DepoConfig) -> int:
    """The edges that a window of `windows` has room for."""
    return -(-2 * config.nodes // config.windows)


def row_length(data: DataConfig) -> int:
    """T, the tokens of a row."""
    if data.source == "rule110":
        return rule110_rows(data.rule110).sequence
    if data.source == "depo":
        return depo_rows(data.depo).sequence
    return data.gsm_infinite.max_tokens if data.source == "gsm_infinite" else data.sequence


def targets_share(data: DataConfig) -> float:
    """The share of a row's tokens that have a target: approximate for a task, 1 for text."""
    if data.source == "rule110":
        rows = rule110_rows(data.rule110)
        return rows.targets / rows.sequence
    if data.source == "depo":
        rows = depo_rows(data.depo)
        return rows.targets / rows.sequence
    if data.source == "gsm_infinite":
        return 4 / data.gsm_infinite.max_tokens  # three digits and an end token
    return 1.0


def check_task(data: DataConfig, windows: Sequence[tuple[str, int]]) -> None:
    """Raises ConfigError if the task's settings contradict each other or a window.

    windows: (setting, L) of each window length that the run uses.
    """
    if data.source == "rule110":
        _check_rule110(data.rule110)
        _check_windows(rule110_rows(data.rule110), windows)
    elif data.source == "depo":
        _check_depo(data.depo, windows)
        _check_windows(depo_rows(data.depo), windows)
    else:
        _check_gsm(data.gsm_infinite, windows)


def _check_windows(rows: TaskRows, windows: Sequence[tuple[str, int]]) -> None:
    """The answers need a window of their own, else a window of context would have a target and not sleep. The other
    choice is one window for the whole row, which forgets nothing."""
    for name, window in windows:
        if window != rows.sequence and (rows.context % window or rows.answers > window):
            raise ConfigError(
                f"{name} ({window}) must divide the context of {rows.context} tokens ({rows.named}) and hold the "
                f"{rows.answers} tokens of the answers, so that no window of context has a target; or be "
                f"{rows.sequence}, the whole row, for full attention"
            )


def _check_rule110(config: Rule110Config) -> None:
    if config.label >= config.width:
        raise ConfigError(
            f"data.rule110.label={config.label} must be less than data.rule110.width={config.width}: it is the number "
            "of a cell, from 0 on"
        )
    mixed = config.mixed_steps
    if len(mixed) == 1 or len(set(mixed)) < len(mixed) or any(not 1 <= t <= MOST_OPERATIONS for t in mixed):
        raise ConfigError(
            f"data.rule110.mixed_steps={list(mixed)} must be empty or hold two or more different numbers of updates, "
            f"each from 1 to {MOST_OPERATIONS}; for one number of all rows set data.rule110.steps"
        )


def _check_depo(config: DepoConfig, windows: Sequence[tuple[str, int]]) -> None:
    if config.windows < 0 or config.windows == 1:
        raise ConfigError(f"data.depo.windows={config.windows} must be 0, or 2 and more")
    for name, window in windows if config.windows else ():
        own, row = 2 * depo_window_edges(config) * config.max_word, depo_rows(config).sequence
        if window not in (own, row):
            raise ConfigError(
                f"{name} ({window}) must be {own}, the tokens of each of data.depo.windows={config.windows}, which has "
                f"room for twice its share of the edges; or {row}, the whole row, for full attention"
            )
    if config.min_nodes > config.nodes:
        raise ConfigError(f"data.depo.min_nodes={config.min_nodes} must not exceed data.depo.nodes={config.nodes}")
    words = sum(config.symbols**length for length in range(1, config.max_word + 1))
    if words < 2 * config.nodes:
        raise ConfigError(
            f"data.depo.symbols={config.symbols} and data.depo.max_word={config.max_word} make {words} words, too few "
            f"to name data.depo.nodes={config.nodes} nodes differently (twice as many at least): raise one of them"
        )


def _check_gsm(config: GsmInfiniteConfig, windows: Sequence[tuple[str, int]]) -> None:
    for low, high in (("min_ops", "max_ops"), ("min_tokens", "max_tokens")):
        if getattr(config, low) > getattr(config, high):
            raise ConfigError(
                f"data.gsm_infinite.{low}={getattr(config, low)} must not exceed "
                f"data.gsm_infinite.{high}={getattr(config, high)}"
            )
    if bool(config.train) != bool(config.validation):
        raise ConfigError("data.gsm_infinite.train and data.gsm_infinite.validation must both be files, or both empty")
    for name, window in windows:
        if window > config.max_tokens:
            raise ConfigError(
                f"{name} ({window}) is longer than data.gsm_infinite.max_tokens ({config.max_tokens}), the length of a "
                "row: shorten it or lengthen the row"
            )
