from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from sleeptrain.data.ahead import Ahead


class Maker:
    """Lists the steps that it has made. A step in `blocked` waits for `go`, one in `broken` fails."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int]] = []
        self.threads: set[threading.Thread] = set()
        self.go = threading.Event()
        self.blocked: set[int] = set()
        self.broken: set[int] = set()

    def __call__(self, what: str, step: int) -> str:
        self.made.append((what, step))
        self.threads.add(threading.current_thread())
        if step in self.blocked:
            assert self.go.wait(240)
        if step in self.broken:
            raise OSError(f"step {step}")
        return f"{what} {step}"

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_results_come_in_order_though_steps_are_made_out_of_order() -> None:
    make, ahead = Maker(), Ahead[str](3)
    make.blocked = {1, 4}
    assert ahead.take(make, ("a",), 0) == "a 0"
    make.until(lambda: len(make.made) == 4)  # 2 and 3 are done while 1 waits
    threading.Timer(0.05, make.go.set).start()
    assert [ahead.take(make, ("a",), step) for step in range(1, 12)] == [f"a {step}" for step in range(1, 12)]
    make.until(lambda: len(make.made) == 15)
    assert sorted(make.made) == [("a", step) for step in range(15)]  # each step once


def test_no_more_than_depth_is_made_ahead() -> None:
    make, ahead = Maker(), Ahead[str](2)
    ahead.take(make, ("a",), 5)
    make.until(lambda: len(make.made) == 3)
    time.sleep(0.02)
    assert sorted(make.made) == [("a", 5), ("a", 6), ("a", 7)]
    assert threading.current_thread() not in make.threads and all(thread.daemon for thread in make.threads)


def test_without_depth_each_step_is_made_in_this_thread() -> None:
    make, ahead = Maker(), Ahead[str](0)
    assert [ahead.take(make, ("a",), step) for step in (3, 4, 3)] == ["a 3", "a 4", "a 3"]
    assert make.threads == {threading.current_thread()} and len(make.made) == 3


def test_an_error_is_raised_when_its_step_is_taken() -> None:
    make, ahead = Maker(), Ahead[str](2)
    make.broken = {1}
    assert ahead.take(make, ("a",), 0) == "a 0"
    with pytest.raises(OSError, match="step 1"):
        ahead.take(make, ("a",), 1)
    assert ahead.take(make, ("a",), 2) == "a 2"
    make.broken = set()
    assert ahead.take(make, ("a",), 1) == "a 1"  # not the old failure again


def test_other_arguments_drop_the_steps_made_ahead() -> None:
    make, ahead = Maker(), Ahead[str](2)
    ahead.take(make, ("a",), 0)
    assert ahead.take(make, ("b",), 1) == "b 1"
    assert ahead.take(make, ("b",), 7) == "b 7"
    assert set(ahead._pending) == {("b", 8), ("b", 9)}
    assert ahead.take(make, ("a",), 1) == "a 1"
    make.until(lambda: make.made.count(("a", 1)) == 2)


def test_a_process_ends_while_a_step_is_made() -> None:
    script = (
        "import time\n"
        "from sleeptrain.data.ahead import Ahead\n"
        "ahead = Ahead(2)\n"
        "ahead.take(lambda step: time.sleep(600 if step else 0), (), 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
