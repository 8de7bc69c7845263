"""A request to stop: the first signal counts, and handlers are put back."""

from __future__ import annotations

import signal
import threading

import pytest

from sleeptrain.stop import EXIT_STOPPED, SIGNALS, Stopped, StopRequest, is_main, listening


def test_the_first_signal_counts_and_each_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    request = StopRequest()
    assert not request.requested
    request.receive(signal.SIGUSR1)
    request.receive(signal.SIGTERM)
    assert request.requested and request.signal_name == "SIGUSR1"
    assert capfd.readouterr().err.splitlines() == [
        "sleeptrain: SIGUSR1: stops after the step in progress, with everything saved",
        "sleeptrain: SIGTERM: is stopping already since SIGUSR1; only SIGKILL (kill -9) ends it at once",
    ]


def test_a_silent_request_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    request = StopRequest(began=5.0, says=False)
    request.receive(signal.SIGINT)
    assert request.requested and request.began == 5.0 and capfd.readouterr().err == ""


def test_handlers_are_set_during_the_block() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening() as request:
        with listening() as again:
            assert again is request
        signal.raise_signal(signal.SIGUSR1)
        assert request.signal_name == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with listening() as another:
        assert another is not request and not another.requested


def test_another_thread_gets_no_signal_and_changes_no_handler() -> None:
    found = list[object]()

    def listen() -> None:
        with listening() as request:
            found.extend([request.requested, *map(signal.getsignal, SIGNALS)])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False, *map(signal.getsignal, SIGNALS)]


def test_a_stopped_run_ends_the_process_with_its_code() -> None:
    with pytest.raises(SystemExit) as end:
        raise Stopped
    assert end.value.code == EXIT_STOPPED == 75


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"SLURM_PROCID": "1"}, False),
     ({"RANK": "0", "SLURM_PROCID": "1"}, True)],
)  # fmt: skip
def test_the_main_process_of_a_run(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main() is expected
