"""Measure which paths of a Depo cycle a model follows: its accuracy by the windows of a path's edges.

    python tools/depo_paths.py RUN_OR_CHECKPOINT [--hops 2] [--passes N] [--batches K]

The answer to a question of k hops is k edges away. The model has read each of these edges in some window, which
attention no longer sees. "2 1" stands for the paths whose first edge is in window 2 and whose second is in window 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.older import add_older
from sleeptrain.commands.evaluate import open_checkpoint
from sleeptrain.config.schema import DepoConfig
from sleeptrain.data.tasks.depo import Depo, Word
from sleeptrain.data.tasks.task import Answered
from sleeptrain.errors import DataError, UserError
from sleeptrain.terminal import say
from sleeptrain.train.evaluate import evaluate, held_out

Windows = tuple[int, ...]  # the window of each edge of a path, from 1


class Paths(Depo):
    """Depo with metrics by path. window: L, in tokens. hops: of the questions that count."""

    def __init__(self, config: DepoConfig, window: int, hops: int) -> None:
        super().__init__(config)
        self._window, self._hops = window, hops

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """accuracy: over questions of `hops` hops. paths: {path: (accuracy, number of questions)}, sorted by path."""
        right, total = Counter[Windows](), Counter[Windows]()
        for a in answered:
            rows = a.batch.tokens_BT.tolist()
            edges = [self.edges(row) for row in rows]
            for hops, (row, span), (_, words) in self.questions(a.batch):
                if hops == self._hops:
                    path = follow(edges[row], last_word(rows[row][: span.start + 1], self._config.symbols), hops)
                    total[path] += 1
                    right[path] += bool(a.right_BT[row, words].all())
        if not total:
            raise DataError(f"--hops {self._hops}: no held-out question has so many hops; they have powers of two")
        paths = {path: (right[path] / total[path], total[path]) for path in sorted(total)}
        return {"accuracy": right.total() / total.total(), "paths": paths}

    def edges(self, row: Sequence[int]) -> dict[Word, tuple[Word, int]]:
        """{node: (next node, window in which the edge ends)} of a row's context."""
        edges, words = dict[Word, tuple[Word, int]](), list[tuple[Word, int]]()
        for word, end in context_words(row[: self._shape.context], self._config.symbols):
            words.append((word, end // self._window + 1))
            if len(words) == 2:
                edges[words[0][0]] = words[1]
                words = []
        return edges


def context_words(tokens: Sequence[int], symbols: int) -> Iterator[tuple[Word, int]]:
    """(word, position of its last token) of each word. Pads belong to no word."""
    word: Word = ()
    for position, token in enumerate(tokens):
        if token:
            word += (token,)
        if token > symbols:
            yield word, position
            word = ()


def last_word(tokens: Sequence[int], symbols: int) -> Word:
    """The word that the tokens end with."""
    start = len(tokens) - 1
    while 0 < tokens[start - 1] <= symbols:
        start -= 1
    return tuple(tokens[start:])


def follow(edges: dict[Word, tuple[Word, int]], node: Word, hops: int) -> Windows:
    """The windows of the `hops` edges that start at `node`."""
    path: Windows = ()
    for _ in range(hops):
        node, window = edges[node]
        path += (window,)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="RUN_OR_CHECKPOINT", help="a checkpoint, or a run: its newest one")
    parser.add_argument("--hops", type=int, default=2, help="a power of two, as in held-out questions")
    parser.add_argument("--passes", type=int, nargs="+", metavar="N", help="default: the last N of training")
    parser.add_argument("--batches", type=int, metavar="K", help="default: train.eval_batches of the run")
    add_older(parser)
    options = parser.parse_args()
    try:
        say("\n".join(lines(options)))
    except UserError as error:
        say(f"depo_paths: {error}", sys.stderr)
        return 2
    return 0


def lines(options: argparse.Namespace) -> Iterator[str]:
    loaded = open_checkpoint(options.place, options.passes, batches=options.batches, allow_older=options.allow_older)
    config = loaded.config
    if config.data.source != "depo":
        raise DataError(f"{options.place} was trained on data.source={config.data.source}: only Depo has paths")
    passes = options.passes or loaded.passes[-1:]
    task = Paths(config.data.depo, config.sleep.window, options.hops)
    sets = held_out(loaded.source, config)
    result = evaluate(loaded.model, sets, config, config.sleep.window, passes, task)
    for n in passes:
        yield f"N={n}, {options.hops} hop{'s' * (options.hops > 1)}: {result['accuracy'][str(n)]:.1%}"
        for path, (accuracy, count) in result["metrics"][str(n)]["paths"].items():
            yield f"  windows {' '.join(map(str, path))}  {accuracy:6.1%} of {count}"


if __name__ == "__main__":
    sys.exit(main())
