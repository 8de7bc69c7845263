"""A pool of processes that tokenise units, each process one unit at a time."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait

from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.report import UnitReport
from sleeptrain.prepare.worker import Recipe, Task, Tick, serve, tokenise_unit

END_SECONDS = 5.0


def tokenise(tasks: Iterator[Task], recipe: Recipe, workers: int, tick: Tick) -> Iterator[tuple[Task, UnitReport]]:
    """Yield each task with its report, in the order of completion.

    A task is taken from `tasks` when a worker is free, so `tasks` may depend on the reports so far. With one worker,
    this process does the work. All worker processes are ended when the iteration ends, is abandoned or fails. Raises
    DataError if a worker reports an error, or dies: then the message names the unit.
    """
    if workers == 1:
        tokenizer = load_tokenizer(recipe.tokenizer)
        for task in tasks:
            yield task, tokenise_unit(task, recipe, tokenizer, tick)
        return
    pool: list[_Worker] = []
    try:
        for task in islice(tasks, workers):
            pool.append(_Worker(recipe))
            pool[-1].give(task)
        yield from _gather({worker.connection: worker for worker in pool}, tasks, tick)
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process and its current task."""

    def __init__(self, recipe: Recipe) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, recipe), daemon=True)
        self._process.start()
        theirs.close()  # now only the process has the other end: reading fails once it is gone

    def give(self, task: Task) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except OSError as error:
            raise self.death() from error

    def death(self) -> DataError:
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        how = f"with exit code {code}"
        if code is not None and code < 0:
            how = f"by {signal.Signals(-code).name}"
        hint = "; SIGKILL often means that memory ran out: use fewer --workers" if code == -signal.SIGKILL else ""
        return DataError(f"the process that tokenised {self.task.unit.label} ended {how}{hint}; the same call goes on")

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _gather(busy: dict[Connection, _Worker], tasks: Iterator[Task], tick: Tick) -> Iterator[tuple[Task, UnitReport]]:
    while busy:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            try:
                kind, content = connection.recv()
            except (EOFError, OSError) as error:
                raise worker.death() from error
            if kind == "tick":
                tick(*content)
            elif kind == "failed":
                raise DataError(content)
            else:
                yield worker.task, content
                if (task := next(tasks, None)) is None:
                    del busy[connection]
                else:
                    worker.give(task)
