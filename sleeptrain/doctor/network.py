"""Whether other machines can reach this one by its name, which gloo takes its address from."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from sleeptrain.doctor.finding import Case, Finding, failed, ok

VARIABLE = "GLOO_SOCKET_IFNAME"
# By which every machine calls itself; Debian gives the second kind to a machine's own name.
OWN = (ipaddress.ip_network("127.0.0.0/16"), ipaddress.ip_network("::1/128"))
ROUTES = Path("/proc/net/route")


def check_hostname(case: Case) -> Finding:
    """Red only in a job over several machines: alone, a machine reaches itself under any address."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        names = [name for _, name in socket.if_nameindex()]
        if chosen in names:
            return ok(f"{VARIABLE}={chosen}", interface=chosen)
        return failed(f"{VARIABLE}={chosen}, which is no interface here", f"export {VARIABLE}={likely_interface()}")
    host = socket.gethostname()
    addresses = addresses_of(host)
    told = f"{host} is {', '.join(addresses)}" if addresses else f"{host} has no address"
    cure = f"export {VARIABLE}={likely_interface()}"
    if any(not _is_own(address) for address in addresses):
        return ok(told, addresses=addresses)
    if case.machines > 1:
        return failed(f"{told}, where the job's other machines cannot reach it", cure, addresses=addresses)
    return ok(f"{told}: enough for one machine; over several, {cure}", addresses=addresses)


def addresses_of(host: str) -> list[str]:
    """Empty where the name cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_own(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return any(parsed in network for network in OWN if network.version == parsed.version)


def likely_interface() -> str:
    """That of the default route, else the first that is no loopback, else a word to replace."""
    if ROUTES.exists():
        rows = [line.split() for line in ROUTES.read_text().splitlines()[1:]]
        if routes := [row[0] for row in rows if row[1] == "00000000"]:
            return routes[0]
    others = [name for _, name in socket.if_nameindex() if not name.startswith("lo")]
    return others[0] if others else "INTERFACE"
