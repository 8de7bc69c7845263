"""The stacks of the threads of a process, as text and in a file of the run."""

from __future__ import annotations

import threading
from pathlib import Path

from sleeptrain.watch.progress import Location, Phase
from sleeptrain.watch.stacks import python_stacks, stacks_file, write_stacks


def test_all_threads_have_stacks() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def waits_for_nothing() -> None:
        begun.set()
        goes_on.wait(600)

    thread = threading.Thread(target=waits_for_nothing)
    thread.start()
    begun.wait(600)
    try:
        text = python_stacks()
    finally:
        goes_on.set()
        thread.join()
    assert "in waits_for_nothing" in text and "in test_all_threads_have_stacks" in text


def test_a_file_is_named_by_step_and_rank() -> None:
    run = Path("runs/r")
    assert stacks_file(run, Location(12, Phase.FORWARD, 1, 1), 3) == run / "stacks" / "step-00000012-rank-3.txt"
    assert stacks_file(run, Location(None, Phase.STARTING), 0) == run / "stacks" / "start-rank-0.txt"


def test_the_reason_is_above_the_stacks(tmp_path: Path) -> None:
    path = tmp_path / "stacks" / "start-rank-0.txt"
    write_stacks(path, "rank 1 was lost", "Thread …")
    assert path.read_text() == "rank 1 was lost\n\nThread …"
