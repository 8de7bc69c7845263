"""Which paths of a Depo cycle does a model follow? Its accuracy by the windows in which a path's edges stood.

    python tools/depo_paths.py RUN_OR_CHECKPOINT [--hops 2] [--passes N] [--batches K]

A question k edges on leads over k edges, each of which stood in one of the windows that were read and forgotten. "2 1"
are the paths of two edges whose first stood in window 2 and whose second in window 1.
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

Windows = tuple[int, ...]  # of a path's edges, from 1


class Paths(Depo):
    """The same task, judged by paths. window: L, tokens."""

    def __init__(self, config: DepoConfig, window: int, hops: int) -> None:
        super().__init__(config)
        self._window, self._hops = window, hops

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """accuracy: of the questions `hops` edges on. paths: {path: (accuracy, questions)}, in order."""
        right, total = Counter[Windows](), Counter[Windows]()
        for a in answered:
            rows = a.batch.tokens_BT.tolist()
            edges = [self.edges(row) for row in rows]
            for hops, (row, at), (_, words) in self.questions(a.batch):
                if hops == self._hops:
                    path = follow(edges[row], last_word(rows[row][: at.start + 1], self._config.symbols), hops)
                    total[path] += 1
                    right[path] += bool(a.right_BT[row, words].all())
        if not total:
            raise DataError(f"--hops {self._hops}: no held-out question has so many; they have powers of two")
        paths = {path: (right[path] / total[path], total[path]) for path in sorted(total)}
        return {"accuracy": right.total() / total.total(), "paths": paths}

    def edges(self, row: Sequence[int]) -> dict[Word, tuple[Word, int]]:
        """{node: (the next one, the window in which their edge ends)} of a row's context."""
        found, words = dict[Word, tuple[Word, int]](), list[tuple[Word, int]]()
        for word, end in context_words(row[: self._shape.context], self._config.symbols):
            words.append((word, end // self._window + 1))
            if len(words) == 2:
                found[words[0][0]] = words[1]
                words = []
        return found


def context_words(tokens: Sequence[int], symbols: int) -> Iterator[tuple[Word, int]]:
    """The words and the position of each one's last token; pads are none."""
    word: Word = ()
    for at, token in enumerate(tokens):
        if token:
            word += (token,)
        if token > symbols:
            yield word, at
            word = ()


def last_word(tokens: Sequence[int], symbols: int) -> Word:
    """The word that the tokens end with."""
    begin = len(tokens) - 1
    while 0 < tokens[begin - 1] <= symbols:
        begin -= 1
    return tuple(tokens[begin:])


def follow(edges: dict[Word, tuple[Word, int]], node: Word, hops: int) -> Windows:
    path: Windows = ()
    for _ in range(hops):
        node, window = edges[node]
        path += (window,)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, metavar="RUN_OR_CHECKPOINT", help="of a run its newest checkpoint")
    parser.add_argument("--hops", type=int, default=2, help="a power of two, for those are asked of held-out cycles")
    parser.add_argument("--passes", type=int, nargs="+", metavar="N", help="default: as the model was trained last")
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
    opened = open_checkpoint(options.place, options.passes, batches=options.batches, allow_older=options.allow_older)
    config = opened.config
    if config.data.source != "depo":
        raise DataError(f"{options.place} was trained on data.source={config.data.source}: only Depo has paths")
    passes = options.passes or opened.passes[-1:]
    judge = Paths(config.data.depo, config.sleep.window, options.hops)
    sets = held_out(opened.source, config)
    found = evaluate(opened.model, sets, config, config.sleep.window, passes, judge)
    for n in passes:
        yield f"N={n}, {options.hops} hop{'s' * (options.hops > 1)}: {found['accuracy'][str(n)]:.1%}"
        for path, (accuracy, count) in found["metrics"][str(n)]["paths"].items():
            yield f"  windows {' '.join(map(str, path))}  {accuracy:6.1%} of {count}"


if __name__ == "__main__":
    sys.exit(main())
