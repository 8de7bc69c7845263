"""GSM-Infinite as a task: the question, a long context, and then only the final answer to predict.

A row's inputs are the question, the context, "Answer:" and the answer without its end token. Its targets are the
answer's tokens and the end token. The question begins at the row's start, where the windows begin too, and pads fill
the rest of the row.
Zhou et al., "GSM-Infinite" (arXiv 2502.05252); the sleep paper (arXiv 2605.26099), section 6.3. The problems come from
our own generator, or from files of the public generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sleeptrain.config.schema import GsmInfiniteConfig
from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.gsm_infinite.graph import MAX_VALUE
from sleeptrain.data.tasks.gsm_infinite.pool import Generated, Pool, Stored
from sleeptrain.data.tasks.gsm_infinite.problem import Lengths, Problem
from sleeptrain.data.tasks.gsm_infinite.words import WordTokenizer
from sleeptrain.data.tasks.task import PRIOR, Answered
from sleeptrain.data.tokenizer import Tokenizer, load_tokenizer

PRIOR_SAMPLES = 2000


class GsmInfinite:
    """A `Task`. sequence: `max_tokens`; no row is longer.

    Raises ConfigError for lengths that problems cannot have, DataError for an invalid tokenizer or file, or a problem
    that is in both files.
    """

    name = "gsm_infinite"
    rows_alike = False

    def __init__(self, config: GsmInfiniteConfig) -> None:
        self._config = config
        self._tokenizer: Tokenizer | WordTokenizer = (
            load_tokenizer(Path(config.tokenizer)) if config.tokenizer else WordTokenizer()
        )
        self.vocab_size = self._tokenizer.vocab_size
        self.tokenizer_hash: str | None = self._tokenizer.hash
        self.sequence = config.max_tokens
        answer = max(len(self._answer(number)) for number in range(MAX_VALUE + 1)) - 1  # the end token is no input
        lengths = Lengths(config.min_tokens, config.max_tokens, answer, self._count)
        self._pool: Pool = Stored(config, self._row_length) if config.train else Generated(config, lengths)
        self.num_held_out = self._pool.num_held_out

    def rows(self, seed: int, first: int, count: int) -> Batch:
        return self._batch([self._pool.training(seed, number) for number in range(first, first + count)], first)

    def held_out(self, first: int, count: int) -> Batch:
        return self._batch([self._pool.held_out(number) for number in range(first, first + count)], first)

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """accuracy: share of rows whose answer, with its end, is right at every token. Greedy decoding has the same
        accuracy, because both read the same inputs up to the first wrong token. accuracy_by_ops: for each `ops`."""
        right, total = Counter[int](), Counter[int]()
        for a in answered:
            rows_right = (a.right_BT == a.wanted_BT).all(-1).tolist()
            numbers = a.batch.documents_BT[:, 0].tolist()
            for number, is_right in zip(numbers, rows_right, strict=True):
                ops = self._pool.held_out_ops(number)
                total[ops] += 1
                right[ops] += is_right
        return {
            "accuracy": right.total() / total.total(),
            "accuracy_by_ops": {f"ops={ops}": right[ops] / total[ops] for ops in sorted(total)},
        }

    def guessing(self) -> dict[str, float]:
        """commonest: the accuracy of always giving the most frequent answer, estimated on 2,000 problems."""
        return {"commonest": self._commonest}

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def report(self) -> dict[str, Any]:
        return self._pool.report()

    def identity(self) -> dict[str, Any]:
        names = ("min_ops", "max_ops", "min_tokens", "max_tokens")
        settings = {f"data.gsm_infinite.{name}": getattr(self._config, name) for name in names}
        return settings | {"the tokenizer's sha256": self._tokenizer.hash} | self._pool.identity()

    @cached_property
    def _commonest(self) -> float:
        answers = Counter(self._pool.answer(Draws(0, PRIOR, number)) for number in range(PRIOR_SAMPLES))
        return answers.most_common(1)[0][1] / PRIOR_SAMPLES

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _answer(self, answer: int) -> list[int]:
        """The tokens of an answer and the end token."""
        return [*self._tokenizer.encode(f" {answer}"), self._tokenizer.eos_id]

    def _row_length(self, problem: Problem) -> int:
        return self._count(problem.prompt) + len(self._answer(problem.answer)) - 1

    def _batch(self, problems: Sequence[Problem], first: int) -> Batch:
        tokens_BT = np.full((len(problems), self.sequence), PAD_TOKEN, np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORE)
        documents_BT = np.full_like(tokens_BT, PAD)
        for row, problem in enumerate(problems):
            prompt, answer = self._tokenizer.encode(problem.prompt), self._answer(problem.answer)
            stop = len(prompt) + len(answer) - 1
            assert stop <= self.sequence, "a row is longer than its sentences together"
            tokens_BT[row, :stop] = prompt + answer[:-1]
            targets_BT[row, len(prompt) - 1 : stop] = answer
            documents_BT[row, :stop] = first + row
        apart_B = np.zeros(len(problems), bool)
        return Batch(*map(torch.from_numpy, (tokens_BT, targets_BT, documents_BT, apart_B, apart_B)))
