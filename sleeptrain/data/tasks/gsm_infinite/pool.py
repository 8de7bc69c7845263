"""Sources of problems: generated without end, or read from files and shuffled in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

from sleeptrain.config.schema import GsmInfiniteConfig
from sleeptrain.data.philox import random_order
from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.files import read_problems
from sleeptrain.data.tasks.gsm_infinite.problem import Lengths, Problem, draw_core, make_problem
from sleeptrain.data.tasks.task import TRAIN, VALIDATION
from sleeptrain.errors import DataError


class Pool(Protocol):
    """Problems by number. num_held_out: number of held-out problems, which training never sees."""

    num_held_out: int

    def training(self, seed: int, number: int) -> Problem: ...

    def held_out(self, number: int) -> Problem: ...

    def held_out_ops(self, number: int) -> int:
        """The number of operations of a held-out problem."""

    def answer(self, draws: Draws) -> int:
        """The answer of a random problem."""

    def report(self) -> dict[str, Any]: ...

    def identity(self) -> dict[str, Any]: ...


class Generated:
    """Problems that are generated from a seed and a number. The operations are uniform on [min_ops, max_ops].

    Raises ConfigError for lengths that problems cannot have.
    """

    def __init__(self, config: GsmInfiniteConfig, lengths: Lengths) -> None:
        lengths.check(config.max_ops)
        self._config, self._lengths = config, lengths
        self.num_held_out = config.validation_samples

    def training(self, seed: int, number: int) -> Problem:
        return self._make(Draws(seed, TRAIN, number), held_out=False)

    def held_out(self, number: int) -> Problem:
        return self._make(Draws(0, VALIDATION, number), held_out=True)

    def held_out_ops(self, number: int) -> int:
        return self._ops(Draws(0, VALIDATION, number))

    def answer(self, draws: Draws) -> int:
        core = draw_core(draws, self._ops(draws), held_out=False)
        return core.graph.values[core.query]

    def report(self) -> dict[str, Any]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {}

    def _ops(self, draws: Draws) -> int:
        """The number of operations, always the first draw of a problem."""
        return draws.between(self._config.min_ops, self._config.max_ops)

    def _make(self, draws: Draws, held_out: bool) -> Problem:
        return make_problem(draws, draw_core(draws, self._ops(draws), held_out), self._lengths)


class Stored:
    """The problems of two files whose operations and lengths fit the settings; every epoch has its own order.

    length: returns the tokens of a problem's row. Raises DataError if no problem fits, or one is in both files.
    """

    def __init__(self, config: GsmInfiniteConfig, length: Callable[[Problem], int]) -> None:
        self._train, left_out = _fitting(config, config.train, length)
        self._held_out, held_out_left_out = _fitting(config, config.validation, length)
        self._left_out = left_out + held_out_left_out
        both = {_content(p) for p in self._train} & {_content(p) for p in self._held_out}
        if both:
            raise DataError(
                f"{len(both)} problems of {config.validation} are in {config.train} too: what is held out must not be "
                "trained on; take them out of one file"
            )
        self.num_held_out = min(len(self._held_out), config.validation_samples)
        # A file may be sorted by operations, and evaluation uses only the first problems.
        self._held_out_order = random_order(len(self._held_out), 0, VALIDATION).tolist()
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def training(self, seed: int, number: int) -> Problem:
        epoch, index = divmod(number, len(self._train))
        return self._train[self._order(seed, epoch)[index]]

    def held_out(self, number: int) -> Problem:
        return self._held_out[self._held_out_order[number]]

    def held_out_ops(self, number: int) -> int:
        return self.held_out(number).ops

    def answer(self, draws: Draws) -> int:
        return draws.choice(self._train).answer

    def report(self) -> dict[str, Any]:
        """problems: number of training problems. left_out: problems of both files with other lengths or operations."""
        return {"problems": len(self._train), "left_out": self._left_out}

    def identity(self) -> dict[str, Any]:
        return {"the problems' sha256": {"train": _hash(self._train), "validation": _hash(self._held_out)}}

    def _order_of_epoch(self, seed: int, epoch: int) -> list[int]:
        return random_order(len(self._train), seed, epoch).tolist()


def _fitting(config: GsmInfiniteConfig, path: str, length: Callable[[Problem], int]) -> tuple[list[Problem], int]:
    """(problems of a file that fit the settings, number of the others)."""
    problems = read_problems(Path(path))
    with_ops = [p for p in problems if config.min_ops <= p.ops <= config.max_ops]
    fitting = [p for p in with_ops if config.min_tokens <= length(p) <= config.max_tokens]
    if not fitting:
        raise DataError(
            f"problems {path}: of {len(problems)}, {len(with_ops)} have {config.min_ops} to {config.max_ops} "
            f"operations and none of these {config.min_tokens} to {config.max_tokens} tokens; change "
            "data.gsm_infinite.min_ops, max_ops, min_tokens or max_tokens"
        )
    return fitting, len(problems) - len(fitting)


def _content(problem: Problem) -> tuple[str, ...]:
    """The identity of a problem, independent of the order of its sentences, of spaces and of Unicode forms."""
    question, context = (" ".join(normalize("NFKC", text).split()) for text in (problem.question, problem.context))
    return (question, *sorted(sentence.strip() for sentence in context.split(".")))


def _hash(problems: Sequence[Problem]) -> str:
    return hashlib.sha256(repr([(p.prompt, p.answer) for p in problems]).encode()).hexdigest()
