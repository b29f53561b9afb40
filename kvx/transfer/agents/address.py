"""Where agents listen: ``tcp://host:port`` and ``unix:path``, and which of it leaves the host."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from kvx.errors import UsageError

UNIX_PATH_BYTES_MAX = 107
_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]+)):(\d{1,5})")
_PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or number, and a port; 0 to listen on a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else (
            f"tcp://{self.host}:{self.port}"
        )  # fmt: skip

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for all interfaces."""
        number = _number(self.host)
        return number is not None and number.is_unspecified


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Return what an address says.

    Raises:
        UsageError: It is neither ``tcp://host:port`` nor ``unix:path``.
    """
    found = _TCP.fullmatch(text)
    if found is not None and int(found[3]) <= _PORT_MAX:
        return TcpAddress(found[1] or found[2], int(found[3]))
    if text.startswith("unix:") and text != "unix:" and "\0" not in text:
        path = text.removeprefix("unix:").removeprefix("//")
        if path and len(path.encode()) <= UNIX_PATH_BYTES_MAX:
            return UnixAddress(path)
        raise UsageError(
            f"{text!r}: the path of a socket has 1 to {UNIX_PATH_BYTES_MAX} bytes; take a shorter "
            "directory"
        )
    raise UsageError(
        f"{text!r} is no address; accepted: tcp://host:port, tcp://[::1]:port, unix:/path"
    )


def is_address(text: str) -> bool:
    """Return whether a text is meant as an address, not as the name of an agent."""
    return text.startswith(("tcp:", "unix:"))


def is_loopback(host: str) -> bool:
    """Return whether everything a host's name stands for stays within this machine."""
    number = _number(host)
    if number is not None:
        return number.is_loopback
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    numbers = [_number(str(entry[4][0])) for entry in found]
    return bool(numbers) and all(one is not None and one.is_loopback for one in numbers)


def is_loopback_peer(address: str) -> bool:
    """Return whether a connected socket's other side, ``host:port``, is on this machine."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    number = _number(host)
    return number is not None and number.is_loopback


def reachable_host() -> str:
    """Return the address by which other machines reach this one; loopback when there is no route.

    Connecting a datagram socket sends nothing: it asks the kernel for the route to a documentation
    address (RFC 5737).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(number, "ipv4_mapped", None)
    return mapped if mapped is not None else number
