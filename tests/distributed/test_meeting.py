"""The processes of a run meet at their address, or say why not. Signals stop them while they wait."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.distributed import launch, meeting
from sleeptrain.distributed.meeting import Limit, open_store, while_listening
from sleeptrain.distributed.world import World
from sleeptrain.errors import MeetingError
from sleeptrain.stop import EXIT_STOPPED, Stopped, StopRequest
from sleeptrain.train import trainer
from sleeptrain.train.status import read_status
from tests.parallel.processes import PATIENCE
from tests.parallel.test_train import records, settings
from tests.watch.ranks import Ranks, free_port, started

pytestmark = pytest.mark.usefixtures("imported")


@contextmanager
def occupied() -> Iterator[tuple[int, socket.socket]]:
    """A port at which another program listens and says nothing, and its socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1], listener


def config_of(folder: Path, *more: str) -> Config:
    return compose(settings(folder, "train.micro_batch=4", "parallel.pipeline=2", *more))


def ends_by_signal(ranks: Ranks, rank: int, number: signal.Signals) -> None:
    pid = ranks.workers[rank].pid
    assert pid is not None
    os.kill(pid, number)
    assert ranks.wait([rank], timeout=PATIENCE) == [EXIT_STOPPED], ranks.log(rank)
    assert "Traceback" not in ranks.log(rank)


def test_all_ranks_report_an_occupied_port_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ANSWER_WITHIN", 1.0)
    with occupied() as (port, _), started(tmp_path, config_of(tmp_path), 2, None, port) as ranks:
        assert ranks.wait([0, 1], timeout=PATIENCE) == [1, 1]
        (first,), (other,) = (ranks.log(rank).splitlines() for rank in (0, 1))
    cure = rf".*Export another MASTER_PORT, or end .*\(.*ss -ltnp 'sport = :{port}'"
    assert re.match(rf"sleeptrain: port {port} of 127\.0\.0\.1, .*: Address already in use\. {cure}", first)
    assert re.match(
        rf"sleeptrain: another program answers at 127\.0\.0\.1 port {port}, .*: {cure}", other, re.IGNORECASE
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_rank_that_waits_for_an_answer(tmp_path: Path, number: signal.Signals) -> None:
    with occupied() as (port, listener), started(tmp_path, config_of(tmp_path), 2, None, port) as ranks:
        accepted = [listener.accept() for _ in range(2)]  # the first connection is a test, the second one torch's own
        ends_by_signal(ranks, 1, number)
        assert ranks.log(1) == f"sleeptrain: {number.name}: stops after the step in progress, with everything saved\n"
        for connection, _ in accepted:
            connection.close()


def test_a_signal_stops_rank_0_while_it_waits_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel stops another rank as soon as it begins."""
    connect = meeting._connect

    def never(address: str, port: int, until: float, limit: Limit) -> dist.Store:
        store = connect(address, port, until, limit)
        stop_here()
        return store

    monkeypatch.setattr(meeting, "_connect", never)
    rank_0_ends(tmp_path)


def test_a_signal_stops_rank_0_while_it_waits_for_the_first_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel stops another rank when all have met."""
    make_world = launch._make_world

    def never(config: Config, place: launch.Place, device: torch.device, opened: bool) -> World:
        world = make_world(config, place, device, opened)
        if place.rank > 0:
            stop_here()
        return world

    monkeypatch.setattr(launch, "_make_world", never)
    rank_0_ends(tmp_path)


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(PATIENCE)  # the thread may run for a moment


def rank_0_ends(tmp_path: Path) -> None:
    """Rank 1 is stopped, and a signal ends rank 0."""
    with started(tmp_path, config_of(tmp_path), 2, None) as ranks:
        pid = ranks.workers[1].pid
        assert pid is not None and os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        ends_by_signal(ranks, 0, signal.SIGTERM)
        assert ranks.log(0).splitlines() == [
            "sleeptrain: SIGTERM: stops after the step in progress, with everything saved",
            "sleeptrain: SIGTERM: stopped before the run was opened; the same command starts it again",
        ]
    status = read_status(tmp_path / "r")
    assert status is not None and (status["state"], status["reason"], status["exit_code"]) == ("stopped", "SIGTERM", 75)


def test_ranks_that_have_not_come_are_named() -> None:
    store = dist.HashStore()
    store.set("1", "")
    with pytest.raises(MeetingError, match=r"2 of 4 processes have come to node1 port 7 in time; missing: ranks 2-3"):
        meeting._await_all(store, 0, 4, 0.0, "node1 port 7")
    with pytest.raises(MeetingError, match=r"missing: rank 0"):
        meeting._await_all(dist.PrefixStore("other", store), 1, 2, 0.0, "node1 port 7")


def test_a_rank_0_that_does_not_come_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    message = rf"rank 0 does not listen at 127.0.0.1 port {port} \(Connection refused\).*MASTER_ADDR"
    with pytest.raises(MeetingError, match=message):
        while_listening(lambda limit: meeting.meet(1, 2, "r", 0.0, limit), StopRequest())


@pytest.mark.slow
def test_the_runs_of_a_sweep_meet_at_one_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, folders = trainer.train, [tmp_path / name for name in ("first", "second")]
    monkeypatch.setattr(trainer, "train", lambda _: max(train(config_of(folder)) for folder in folders))
    with started(tmp_path, config_of(tmp_path), 2, None) as ranks:
        assert ranks.wait([0, 1], timeout=PATIENCE) == [0, 0], ranks.log(0) + ranks.log(1)
    first, second = ([r["loss"] for r in records(folder) if "loss" in r] for folder in folders)
    assert first and first == second


def test_a_thread_that_never_returns_is_abandoned_at_a_signal_and_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FINISH_WITHIN", 0.0)
    forever, request = threading.Event(), StopRequest()

    def stuck(limit: Limit) -> None:
        request.receive(signal.SIGTERM)
        forever.wait()

    def late(limit: Limit) -> None:
        with limit.of(0.0, "too late"):
            forever.wait()

    try:
        with pytest.raises(Stopped):
            while_listening(stuck, request)
        with pytest.raises(MeetingError, match="too late"):
            while_listening(late, StopRequest())
    finally:
        forever.set()


def test_ranks_that_have_met_go_on_after_a_signal() -> None:
    """Ranks do not stop one by one: they agree on the step at which they stop."""
    request = StopRequest()

    def finishes(limit: Limit) -> int:
        request.receive(signal.SIGTERM)
        return 7

    assert while_listening(finishes, request) == 7


def listens_at(address: str) -> str:
    with meeting._listener(address, 0) as listener:
        return str(listener.getsockname()[0])


def test_a_store_listens_on_the_interface_that_its_address_names() -> None:
    store = open_store("127.0.0.1", 0)
    other = dist.TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
    other.set("a", "b")
    assert store.get("a") == b"b"
    assert listens_at("127.0.0.1") == "127.0.0.1" and listens_at("localhost") in ("127.0.0.1", "::1")


@pytest.mark.parametrize("address", ["127.0.1.1", "203.0.113.7"], ids=["its own name for itself", "not its own"])
def test_a_store_is_reached_under_names_that_resolve_differently_elsewhere(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert listens_at("node1") in ("::", "0.0.0.0")


def test_an_unknown_address_is_reported() -> None:
    with pytest.raises(MeetingError, match=r"MASTER_ADDR=no\.such\.invalid does not resolve here"):
        open_store("no.such.invalid", 0)
