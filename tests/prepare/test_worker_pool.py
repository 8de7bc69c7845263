"""Real processes: the files after a kill, and no process that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.units import plan_units
from sleeptrain.prepare.worker import Recipe, Task
from sleeptrain.prepare.worker_pool import tokenise
from tests.data.texts import make_texts
from tests.prepare.test_job import content

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240.0  # for an event that must come, however busy the machine is
# Every Python with this file on its path reads it: a worker opens z.txt after somebody has opened the gate to write.
GATE = """
import sys
from pathlib import Path

def wait(event, arguments):
    if event == "open" and str(arguments[0]).endswith("z.txt"):
        Path(arguments[0]).with_name("gate").open().close()

if b"spawn_main" in Path("/proc/self/cmdline").read_bytes():
    sys.addaudithook(wait)
"""

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc"),
]


@pytest.fixture
def corpus(write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Path:
    """Some forty units and their tokenizer. The last unit waits at the gate, so no call ends before it opens."""
    texts = make_texts(300)
    write_jsonl(f"{i} " + " ".join(texts[i : i + 30]) for i in range(250))
    (tmp_path / "given.model").write_bytes(tokenizer.files["tokenizer.model"])
    (tmp_path / "z.txt").write_text("the last\n")
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "sitecustomize.py").write_text(GATE)
    return tmp_path


def command(corpus: Path, out: str, workers: int) -> list[str]:
    return [
        sys.executable, str(ROOT / "tools/prepare.py"), "--input", str(corpus / "a.jsonl"), str(corpus / "z.txt"),
        "--out", str(corpus / out), "--tokenizer", str(corpus / "given.model"), "--workers", str(workers),
        "--unit-bytes", "60000", "--shard-bytes", "20000", "--validation-share", "0.3",
    ]  # fmt: skip


def finish(corpus: Path, out: str, workers: int = 1) -> dict[str, bytes]:
    subprocess.run(command(corpus, out, workers), stdout=subprocess.DEVNULL, cwd=ROOT, timeout=SECONDS, check=True)
    assert not (corpus / f".{out}.work").exists()
    return content(corpus / out)


class Running:
    """A preparation in its own processes, all of which have ended when the test ends."""

    def __init__(self, corpus: Path, out: str, workers: int) -> None:
        self.units = corpus / f".{out}.work" / "units"
        self.found: list[int] = []
        self.process = subprocess.Popen(
            command(corpus, out, workers),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(corpus)},
            # A background job of a shell ignores Ctrl-C, and so do its children; these tests may be one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, units: int) -> None:
        until = time.monotonic() + SECONDS
        while len(list(self.units.glob("0*"))) < units:
            assert self.process.poll() is None, "ended too early for this test"
            assert time.monotonic() < until
            time.sleep(0.01)

    def workers(self) -> list[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.found = [int(child) for child in children if is_worker(int(child))]
        return self.found

    def end(self) -> None:
        """End all processes, also where the test found that one outlives its parent."""
        self.process.kill()
        for pid in filter(is_worker, self.found):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=SECONDS)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def begin(corpus: Path, out: str = "out", workers: int = 2) -> Running:
        begun.append(Running(corpus, out, workers))
        return begun[-1]

    yield begin
    for running in begun:
        running.end()


def is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


def wait_until_gone(pids: list[int]) -> None:
    until = time.monotonic() + SECONDS
    while not all(map(gone, pids)):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.02)


def test_parent_killed(corpus: Path, start: Callable[..., Running]) -> None:
    running = start(corpus)
    running.wait_for(4)
    workers = running.workers()
    assert len(workers) == 2
    running.process.kill()
    wait_until_gone(workers)
    complete = {path.parent.name: path.stat().st_ino for path in running.units.glob("0*/report.json")}
    assert len(complete) >= 4
    expected = finish(corpus, "out", workers=2)
    assert expected == {name: data.replace(b"other", b"out") for name, data in finish(corpus, "other").items()}


def test_parent_killed_while_its_workers_are_busy(corpus: Path, start: Callable[..., Running]) -> None:
    running = start(corpus)
    (last,) = named_inputs([str(corpus / "a.jsonl")])
    running.wait_for(-(-last.size // 60_000) - 1)  # all but the last, in which a worker waits
    workers = running.workers()
    running.process.kill()
    wait_until_gone(workers)


def test_worker_killed(corpus: Path, start: Callable[..., Running]) -> None:
    running = start(corpus)
    running.wait_for(4)
    victim, other = running.workers()
    os.kill(victim, signal.SIGTERM)  # on a cluster the whole group gets this signal: the parent decides
    running.wait_for(6)
    os.kill(victim, signal.SIGKILL)
    error = running.process.communicate(timeout=SECONDS)[1]
    assert running.process.returncode == 2
    assert error.count("\n") == 1
    assert "prepare: the process that tokenised unit " in error and "a.jsonl" in error and "by SIGKILL" in error
    wait_until_gone([victim, other])
    assert len(list(running.units.glob("0*"))) >= 6
    assert finish(corpus, "out", 2) == {n: d.replace(b"other", b"out") for n, d in finish(corpus, "other").items()}


def test_interrupted(corpus: Path, start: Callable[..., Running]) -> None:
    running = start(corpus)
    running.wait_for(2)
    workers = running.workers()
    running.process.send_signal(signal.SIGINT)
    assert running.process.communicate(timeout=SECONDS)[1] == "prepare: interrupted; the same call goes on\n"
    assert running.process.returncode == 130
    wait_until_gone(workers)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_again_and_again(corpus: Path, start: Callable[..., Running], seed: int) -> None:
    rng = random.Random(seed)
    for units in range(0, 28, 7):
        running = start(corpus, workers=rng.choice([1, 2, 3]))
        running.wait_for(units + rng.randint(0, 4))
        time.sleep(0.05 * rng.random())
        workers = running.workers()
        victim = rng.choice([running.process.pid, *workers])
        os.kill(victim, signal.SIGKILL)
        running.process.wait(SECONDS)
        wait_until_gone([*workers, running.process.pid])
    assert finish(corpus, "out", 2) == {n: d.replace(b"other", b"out") for n, d in finish(corpus, "other").items()}


def test_an_error_of_a_worker_reaches_the_caller(
    write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    path = write_jsonl(make_texts(40))
    (tmp_path / "t.model").write_bytes(tokenizer.files["tokenizer.model"])
    units = plan_units(named_inputs([str(path)]), "text", 2000)
    path.write_bytes(path.read_bytes() + b"\n")
    (tmp_path / "units").mkdir()
    recipe = Recipe(
        tmp_path / "units", tmp_path / "t.model", "text", 0.3, 10_000, skip_bad=False, max_document_bytes=10**6
    )
    with pytest.raises(DataError, match=r"a\.jsonl changed while"):
        list(tokenise((Task(unit) for unit in units), recipe, 2, lambda *_: None))
    assert not list((tmp_path / "units").glob("0*"))
    assert not multiprocessing.active_children()
    program = "import sys, sleeptrain.prepare.worker, sleeptrain.prepare.worker_pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=SECONDS, cwd=ROOT, check=False).returncode == 0
