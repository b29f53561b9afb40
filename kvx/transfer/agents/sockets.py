"""Where an agent listens: what is allowed, the socket file for this host, what others are told."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.config import runtime_directory
from kvx.errors import UnavailableError, UsageError
from kvx.transfer.agents.address import (
    UNIX_PATH_BYTES_MAX,
    TcpAddress,
    UnixAddress,
    is_loopback,
    parse_address,
    reachable_host,
)
from kvx.transfer.agents.metadata import ADDRESSES_MAX

if TYPE_CHECKING:
    from kvx.transfer.agents.config import AgentConfig
    from kvx.transfer.agents.identity import Identity
    from kvx.transfer.core import LinkCore

_SOCKET = re.compile(r"[0-9a-f]{16}\.sock")
_OTHERS = 0o077


def wanted(listen: str | Sequence[str] | None) -> list[TcpAddress | UnixAddress]:
    """Return the addresses that an argument names.

    Raises:
        UsageError: One is malformed, or they are too many.
    """
    texts = [] if listen is None else [listen] if isinstance(listen, str) else list(listen)
    if len(texts) >= ADDRESSES_MAX:
        raise UsageError(f"{len(texts)} addresses to listen on; at most {ADDRESSES_MAX - 1}")
    return [parse_address(text) for text in texts]


def check_key(addresses: Sequence[TcpAddress | UnixAddress], *, has_key: bool) -> None:
    """Refuse to listen beyond this host without a key.

    Raises:
        UsageError: Names the address and the ways out.
    """
    for address in addresses:
        if isinstance(address, TcpAddress) and not has_key and not is_loopback(address.host):
            raise UsageError(
                f"{address} can be reached from other machines and the agent has no key: pass "
                "key=secrets.token_bytes(32), the same to every agent, or listen on 127.0.0.1"
            )


class Listeners:
    """The sockets that an agent listens on, and its own socket file."""

    def __init__(self, core: LinkCore, identity: Identity, config: AgentConfig) -> None:
        """Listen on nothing yet."""
        self._core = core
        self._identity = identity
        self._config = config
        self._path: Path | None = None
        self.addresses: list[str] = []

    def listen(self, wished: Sequence[TcpAddress | UnixAddress], tls: object) -> None:
        """Listen on all of them, and on the socket file unless the configuration says not to.

        Raises:
            KvxError: One cannot be listened on; says why.
        """
        for address in wished:
            if isinstance(address, UnixAddress):
                self._core.listen_unix(address.path)
                self.addresses.append(str(UnixAddress(str(Path(address.path).absolute()))))
            else:
                port = self._core.listen_tcp(address.host, address.port, tls)
                self.addresses += _told(TcpAddress(address.host, port))
        if self._config.unix:
            directory = private_directory(self._config.runtime_directory or runtime_directory())
            remove_stale(directory)
            path = directory / f"{self._identity.incarnation:016x}.sock"
            if len(str(path).encode()) > UNIX_PATH_BYTES_MAX:
                raise UsageError(
                    f"{path}: the path of a socket has at most {UNIX_PATH_BYTES_MAX} bytes; set "
                    "runtime_directory to a shorter one"
                )
            self._core.listen_unix(str(path))
            self._path = path
            self.addresses.append(f"unix:{path}")

    def told(self) -> tuple[str, ...]:
        """Return the addresses that others are told."""
        if not self._config.advertise:
            return tuple(self.addresses[:ADDRESSES_MAX])
        unix = [one for one in self.addresses if one.startswith("unix:")]
        return tuple([*self._config.advertise, *unix][:ADDRESSES_MAX])

    def close(self) -> None:
        """Remove the socket file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _told(address: TcpAddress) -> list[str]:
    """Return by which addresses others reach what listens on this one."""
    if not address.is_wildcard:
        return [str(address)]
    hosts = dict.fromkeys([reachable_host(), "127.0.0.1"])
    return [str(TcpAddress(host, address.port)) for host in hosts]


def socket_directory(name: str) -> Path:
    """Return a directory for socket files of one kind, that this user alone can use.

    It lies in XDG_RUNTIME_DIR, else in /tmp. Files in it are named by 16 hexadecimal digits and
    ``.sock``; those that nobody listens on are removed now.

    Raises:
        UnavailableError: It cannot be made, belongs to somebody else, or lets others in.
    """
    directory = private_directory(private_directory(runtime_directory()) / name)
    remove_stale(directory)
    return directory


def private_directory(path: Path) -> Path:
    """Return a directory that this user alone can use; it is made when it is not there.

    Raises:
        UnavailableError: It belongs to somebody else, or lets others in.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UnavailableError(
            f"{path}: sockets cannot be kept there: {error.strerror}; set runtime_directory "
            "or XDG_RUNTIME_DIR"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _OTHERS:
        raise UnavailableError(
            f"{path}: it must be a directory of this user that nobody else can use (mode 0700); "
            "set runtime_directory or XDG_RUNTIME_DIR"
        )
    return path


def remove_stale(directory: Path) -> None:
    """Remove socket files that nobody listens on any more."""
    for path in directory.iterdir():
        if _SOCKET.fullmatch(path.name) and _is_stale(path):
            path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        with contextlib.suppress(BlockingIOError, FileNotFoundError, PermissionError):
            return probe.connect_ex(str(path)) == errno.ECONNREFUSED
        return False
