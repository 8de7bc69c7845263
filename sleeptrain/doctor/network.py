"""Can other machines reach this one by its name? gloo gets its address from the name."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from sleeptrain.doctor.finding import Case, Finding, failed, ok

VARIABLE = "GLOO_SOCKET_IFNAME"
# Loopback addresses. Debian maps the machine's own name to 127.0.1.1.
LOOPBACK = (ipaddress.ip_network("127.0.0.0/16"), ipaddress.ip_network("::1/128"))
ROUTES = Path("/proc/net/route")


def check_hostname(case: Case) -> Finding:
    """Fails only in a job over several machines: one machine reaches itself under any address."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        names = [name for _, name in socket.if_nameindex()]
        if chosen in names:
            return ok(f"{VARIABLE}={chosen}", interface=chosen)
        return failed(f"{VARIABLE}={chosen}, which is no interface here", f"export {VARIABLE}={likely_interface()}")
    host = socket.gethostname()
    addresses = addresses_of(host)
    description = f"{host} is {', '.join(addresses)}" if addresses else f"{host} has no address"
    cure = f"export {VARIABLE}={likely_interface()}"
    if any(not _is_loopback(address) for address in addresses):
        return ok(description, addresses=addresses)
    if case.machines > 1:
        return failed(f"{description}, where the job's other machines cannot reach it", cure, addresses=addresses)
    return ok(f"{description}: enough for one machine; over several, {cure}", addresses=addresses)


def addresses_of(host: str) -> list[str]:
    """The addresses of a host; empty if the name cannot be resolved."""
    try:
        results = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in results))


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return any(parsed in network for network in LOOPBACK if network.version == parsed.version)


def likely_interface() -> str:
    """The interface of the default route, else the first one that is no loopback, else the placeholder INTERFACE."""
    if ROUTES.exists():
        rows = [line.split() for line in ROUTES.read_text().splitlines()[1:]]
        if routes := [row[0] for row in rows if row[1] == "00000000"]:
            return routes[0]
    others = [name for _, name in socket.if_nameindex() if not name.startswith("lo")]
    return others[0] if others else "INTERFACE"
