from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sleeptrain.doctor import network
from sleeptrain.doctor.finding import FAILED, OK
from tests.doctor.cases import alone


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(network.VARIABLE, raising=False)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    routes = tmp_path / "route"
    routes.write_text("Iface Destination Gateway\nib0 0000A8C0 0\neth0 00000000 0100000A\n")
    monkeypatch.setattr(network, "ROUTES", routes)


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(host: str, port: None, **options: object) -> list[tuple]:
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("addresses", "state"),
    [
        (["10.1.0.7"], OK),
        (["127.77.0.7"], OK),  # an address of its own, though known only on this machine
        (["::1", "10.1.0.7"], OK),
        (["fd00::7"], OK),
        (["127.0.1.1"], FAILED),
        (["127.0.0.1", "::1"], FAILED),
        ([], FAILED),
    ],
)
def test_a_name_in_a_job_of_several_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str], state: str
) -> None:
    resolves_to(monkeypatch, *addresses)
    finding = network.check_hostname(alone(tmp_path, machines=2))
    assert finding.state == state and "node7" in finding.found
    assert finding.cure == ("export GLOO_SOCKET_IFNAME=eth0" if state == FAILED else "")
    assert network.check_hostname(alone(tmp_path)).state == OK  # a single machine reaches itself


def test_alone_the_cure_is_named_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolves_to(monkeypatch, "127.0.1.1")
    assert "export GLOO_SOCKET_IFNAME=eth0" in network.check_hostname(alone(tmp_path)).found


def test_an_interface_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolves_to(monkeypatch)
    monkeypatch.setenv(network.VARIABLE, "ib0")
    assert network.check_hostname(alone(tmp_path, machines=2)).state == OK
    monkeypatch.setenv(network.VARIABLE, "ib9")
    finding = network.check_hostname(alone(tmp_path))
    assert finding.state == FAILED and "ib9" in finding.found and finding.cure == "export GLOO_SOCKET_IFNAME=eth0"


def test_without_a_default_route_the_first_link_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "ROUTES", tmp_path / "none")
    assert network.likely_interface() == "eth0"
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo")])
    assert network.likely_interface() == "INTERFACE"
