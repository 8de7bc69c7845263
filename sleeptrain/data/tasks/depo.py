"""Depo: which node comes k edges later? The model reads the edges of a directed cycle in random order, then questions.

A row has the edges of a cycle, each as the words of its two nodes, padded on the left to a fixed length, and then the
questions: [hop k] [word] [ANSWER] [word]. The loss is on ANSWER and the word after it. A word has 1 to `max_word`
symbols. The last symbol of a word has its own token ids, so words need no separator.
Z. Allen-Zhu, "Physics of Language Models: Part 4.1", 2025, task Depo; sizes of the sleep paper (arXiv 2605.26099),
section 6.2. The paper places the pads on the left; that pads write nothing into the memory is our choice.

With `windows` the context is that many windows, and the row draws how many of its edges each has; ends fill the rest of
a window. So windows of one row differ in how much there is to join, and show it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sleeptrain.config.schema import DepoConfig
from sleeptrain.config.task_rows import depo_rows, depo_window_edges
from sleeptrain.data.batch import IGNORE, PAD, PAD_TOKEN, Batch
from sleeptrain.data.tasks.draws import Draws
from sleeptrain.data.tasks.split import ATTEMPTS, is_held_out
from sleeptrain.data.tasks.task import PRIOR, TRAIN, VALIDATION, Answered
from sleeptrain.errors import ConfigError

Word = tuple[int, ...]
PRIOR_SAMPLES = 256


class Depo:
    """A `Task`. Ids: 0 pad, `symbols` symbols inside a word, `symbols` symbols that end one, `hops` hop counts, ANSWER;
    with `windows` END, the token after a window's edges.

    Raises ConfigError if the names make too few cycles to hold some out.
    """

    name = "depo"
    tokenizer_hash: str | None = None
    rows_alike = False

    def __init__(self, config: DepoConfig) -> None:
        self._config = config
        self._shape = depo_rows(config)
        self._first_hop = 2 * config.symbols + 1  # the id of k = 1
        self.answer_marker = self._first_hop + config.hops
        self.end = self.answer_marker + 1
        self.vocab_size = self.end + bool(config.windows)
        self.sequence = self._shape.sequence
        self.num_held_out = config.validation_samples
        # Small cycles are more likely than large ones, as in the published generator.
        self._sizes = range(config.min_nodes, config.nodes + 1)
        self._weights = [1 / (n + math.sqrt(config.nodes)) for n in self._sizes]
        # Draw both kinds of cycle now, so that a ConfigError comes here and not at the first evaluation.
        self.cycle(Draws(0, PRIOR, 0), config.nodes, held_out=True)
        self.cycle(Draws(0, PRIOR, 0), config.min_nodes, held_out=False)

    def rows(self, seed: int, first: int, count: int) -> Batch:
        return self._batch(seed, TRAIN, first, count)

    def held_out(self, first: int, count: int) -> Batch:
        """Held-out rows: cycles of full size, and questions whose hops are powers of two."""
        return self._batch(0, VALIDATION, first, count)

    def cycle(self, draws: Draws, num_nodes: int, held_out: bool) -> list[Word]:
        """The names of the nodes of a random cycle, in its order. held_out: the side of the split."""
        for _ in range(ATTEMPTS):
            names: dict[Word, None] = {}
            while len(names) < num_nodes:
                names.setdefault(self._word(draws))
            cycle = list(names)
            if is_held_out(_content(cycle)) == held_out:
                return cycle
        raise ConfigError(
            f"data.depo.nodes={self._config.nodes}, data.depo.symbols={self._config.symbols} and data.depo.max_word="
            f"{self._config.max_word} make too few different cycles to hold some out: raise one of them"
        )

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """accuracy: share of answers whose word is right. accuracy_by_hops: the same for each k. loss_by_hops: nats per
        target, the marker included, for each k. With `windows` also accuracy_by_edges and passes_by_edges."""
        right, total, loss, targets = (np.zeros(self._config.hops + 1) for _ in range(4))
        for a in answered:
            for hops, answer, word in self.questions(a.batch):
                total[hops] += 1
                right[hops] += bool(a.right_BT[word].all())
                loss[hops] += float(a.loss_BT[answer].double().sum())
                targets[hops] += a.loss_BT[answer].numel()
        measured_hops = np.flatnonzero(total)
        metrics = {
            "accuracy": float(right.sum() / total.sum()),
            "accuracy_by_hops": {f"k={k}": float(right[k] / total[k]) for k in measured_hops},
            "loss_by_hops": {f"k={k}": float(loss[k] / targets[k]) for k in measured_hops},
        }
        return metrics | (self._by_edges(answered) if self._config.windows else {})

    def _by_edges(self, answered: Sequence[Answered]) -> dict[str, dict[str, float]]:
        """accuracy_by_edges: accuracy by the number of edges in the window that holds the edge to the answer.
        passes_by_edges: under a stop rule, the mean passes of the windows with each number of edges."""
        right, passes = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
        for a in answered:
            windows = [self.edges_of_windows(tokens) for tokens in a.batch.tokens_BT.tolist()]
            for _, _, (row, word) in self.questions(a.batch):
                answer = tuple(a.batch.targets_BT[row, word].tolist())
                [edges] = [w for w in windows[row] if any(to == answer for _, to in w)]
                right[len(edges)].append(float(a.right_BT[row, word].all()))
            for of_row, taken in zip(windows, () if a.passes_BK is None else a.passes_BK.tolist(), strict=False):
                for edges, number in zip(of_row, taken, strict=False):
                    if math.isfinite(number):
                        passes[len(edges)].append(number)
        named = {"accuracy_by_edges": right} | ({"passes_by_edges": passes} if passes else {})
        return {
            name: {f"edges={n}": float(np.mean(by_edges[n])) for n in sorted(by_edges)}
            for name, by_edges in named.items()
        }

    def edges_of_windows(self, tokens: Sequence[int]) -> list[list[tuple[Word, Word]]]:
        """The edges in each window of the context of a row, read from its tokens. Needs `windows`."""
        size, windows = self._shape.context // self._config.windows, list[list[tuple[Word, Word]]]()
        for first in range(0, self._shape.context, size):
            words, word = list[Word](), list[int]()
            for token in tokens[first : first + size]:
                if token == self.end:
                    break
                word.append(token)
                if token > self._config.symbols:
                    words.append(tuple(word))
                    word = []
            windows.append(list(zip(words[::2], words[1::2], strict=True)))
        return windows

    def questions(self, batch: Batch) -> list[tuple[int, tuple[int, slice], tuple[int, slice]]]:
        """(hops, index of the answer's targets, index of the targets of the answer's word) of every question."""
        questions, targets_BT = [], batch.targets_BT.numpy()
        for row, tokens in enumerate(batch.tokens_BT.tolist()):
            hops = 0
            for t in range(self._shape.context, self.sequence):
                if self._first_hop <= tokens[t] < self.answer_marker:
                    hops = tokens[t] - self._first_hop + 1
                elif tokens[t] == self.answer_marker:
                    end = t
                    while targets_BT[row, end] <= self._config.symbols:  # the last symbol of a word has a larger id
                        end += 1
                    questions.append((hops, (row, slice(t - 1, end + 1)), (row, slice(t, end + 1))))
        return questions

    def guessing(self) -> dict[str, float]:
        """Accuracy and loss (nats per target) of a model that knows the nodes of held-out cycles but not their edges.

        It knows where an answer begins, and that k steps lead to another node unless the cycle's size divides k.
        """
        others, word = self._config.nodes - 1, self._mean_word
        leads_back = sum(k % self._config.nodes == 0 for k in self._held_out_hops) / len(self._held_out_hops)
        return {
            "nodes_accuracy": leads_back + (1 - leads_back) / others,
            "nodes_loss": (1 - leads_back) * math.log(others) / (1 + word),
        }

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(self._name(token) for token in tokens if token != PAD_TOKEN)

    def report(self) -> dict[str, Any]:
        return {}

    def identity(self) -> dict[str, Any]:
        names = ["nodes", "min_nodes", "hops", "symbols", "max_word", "queries"]
        if self._config.windows:  # positions saved without it stay valid
            names.append("windows")
        return {f"data.depo.{name}": getattr(self._config, name) for name in names}

    def _word(self, draws: Draws) -> Word:
        length, symbols = draws.between(1, self._config.max_word), self._config.symbols
        return tuple(draws.between(1, symbols) + (symbols if i == length - 1 else 0) for i in range(length))

    def _name(self, token: int) -> str:
        symbols = self._config.symbols
        if token <= symbols:
            return f"{token}-"
        if token < self._first_hop:
            return str(token - symbols)
        if token == self.end:
            return "."
        return "=" if token == self.answer_marker else f"+{token - self._first_hop + 1}:"

    @cached_property
    def _held_out_hops(self) -> list[int]:
        return [2**power for power in range(self._config.hops.bit_length())]

    @cached_property
    def _mean_word(self) -> float:
        """Mean tokens of a node's name in cycles of full size. Names differ, so short names are rarer than drawn."""
        drawn = [self.cycle(Draws(0, PRIOR, i), self._config.nodes, False) for i in range(PRIOR_SAMPLES)]
        return sum(len(word) for cycle in drawn for word in cycle) / (PRIOR_SAMPLES * self._config.nodes)

    def _batch(self, seed: int, stream: int, first: int, count: int) -> Batch:
        tokens_BT = np.full((count, self.sequence), PAD_TOKEN, np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORE)
        documents_BT = np.full_like(tokens_BT, PAD)
        for row in range(count):
            context, questions, is_answer = self._row(Draws(seed, stream, first + row), stream == VALIDATION)
            begin = self._shape.context - len(context)
            part = slice(begin, begin + len(context) + len(questions))
            tokens_BT[row, part] = context + questions
            documents_BT[row, part] = first + row
            predicted = np.flatnonzero(is_answer)
            targets_BT[row, self._shape.context + predicted - 1] = np.asarray(questions)[predicted]
        apart_B = np.zeros(count, bool)
        return Batch(*map(torch.from_numpy, (tokens_BT, targets_BT, documents_BT, apart_B, apart_B)))

    def _row(self, draws: Draws, held_out: bool) -> tuple[list[int], list[int], list[bool]]:
        """(tokens of the edges, tokens of the questions and answers, which of the latter have a loss)."""
        size = self._config.nodes if held_out else self._sizes[draws.weighted(self._weights)]
        cycle = self.cycle(draws, size, held_out)
        edges = [cycle[node] + cycle[(node + 1) % size] for node in draws.shuffled(range(size))]
        context = [token for edge in self._in_windows(draws, edges) for token in edge]
        questions, is_answer = list[int](), list[bool]()
        for start in draws.shuffled(range(size))[: self._config.queries]:
            hops = draws.choice(self._held_out_hops) if held_out else draws.between(1, self._config.hops)
            query, answer = cycle[start], cycle[(start + hops) % size]
            questions += [self._first_hop + hops - 1, *query, self.answer_marker, *answer]
            is_answer += [False] * (1 + len(query)) + [True] * (1 + len(answer))
        return context, questions, is_answer

    def _in_windows(self, draws: Draws, edges: list[Word]) -> list[Word]:
        """The edges with ends after those of each window, if the context has `windows`."""
        windows = self._config.windows
        if not windows:
            return edges
        most, size, counts = depo_window_edges(self._config), self._shape.context // windows, list[int]()
        for later in range(windows - 1, -1, -1):
            remaining = len(edges) - sum(counts)
            counts.append(draws.between(max(remaining - later * most, 0), min(remaining, most)))
        parts, first = list[Word](), 0
        for count in draws.shuffled(counts):
            window = edges[first : first + count]
            parts += [*window, (self.end,) * (size - sum(map(len, window)))]
            first += count
        return parts


def _content(cycle: Sequence[Word]) -> bytes:
    """The identity of a cycle, independent of its first node."""
    first = cycle.index(min(cycle))
    return str([*cycle[first:], *cycle[:first]]).encode()
