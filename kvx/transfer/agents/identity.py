"""Who an agent is, and where: names, incarnations, hosts."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import time
from pathlib import Path
from typing import Annotated

import msgspec

from kvx.errors import UsageError

_PROC = Path("/proc")
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, msgspec.Meta(pattern=f"^{NAME}$", max_length=64)]
# Zero is nobody. The ends are those of what the native core counts in.
Number = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class HostIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Where a process runs; two that agree in the first four may share memory.

    Attributes:
        boot_id: Of the running kernel.
        net_namespace: Inode; processes that differ in it do not see each other's loopback.
        pid_namespace: Inode; process numbers of another one mean nothing here.
        uid: User.
        pid: Process number, in its namespace.
        pid_started: When the process was started, in the kernel's ticks; numbers are reused.
    """

    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    net_namespace: Count
    pid_namespace: Count
    uid: Count
    pid: Count
    pid_started: Count

    def is_same_host(self, other: HostIdentity) -> bool:
        """Return whether both run on one kernel."""
        return bool(self.boot_id) and self.boot_id == other.boot_id

    def is_same_process(self, other: HostIdentity) -> bool:
        """Return whether both are one process."""
        return self == other

    def is_dead(self) -> bool:
        """Return whether the process is known to be gone; False when this host cannot tell."""
        here = host_identity()
        if not self.is_same_host(here) or self.pid_namespace != here.pid_namespace:
            return False
        return _started(self.pid) != self.pid_started


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One life of an agent.

    Attributes:
        name: What people call it.
        incarnation: Random, never 0; another one after each start.
        started_ns: Unix time of the start.
    """

    name: Name
    incarnation: Number
    started_ns: Count

    @property
    def rank(self) -> tuple[str, int]:
        """The order in which two agents that dial each other give way: the smaller one stays."""
        return self.name, self.incarnation

    def is_newer(self, than: Identity) -> bool:
        """Return whether this is a later life of the same agent."""
        return (self.started_ns, self.incarnation) > (than.started_ns, than.incarnation)


def new_identity(name: str) -> Identity:
    """Begin a life.

    Raises:
        UsageError: The name has other characters than letters, digits, ``.``, ``_``, ``-``.
    """
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{name!r} is no name of an agent: up to 64 letters, digits, '.', '_' and '-' are, not "
            "beginning with '.' or '-'"
        )
    return Identity(name, secrets.randbits(62) + 1, time.time_ns())


def host_identity() -> HostIdentity:
    """Return where this process runs."""
    return _host_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _host_of(pid: int) -> HostIdentity:
    """Keep the answer until the process has forked."""
    boot_id = ""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return HostIdentity(
        boot_id, _inode("net"), _inode("pid"), os.getuid(), pid, _started(pid)
    )  # fmt: skip


def _inode(kind: str) -> int:
    try:
        return (_PROC / "self/ns" / kind).stat().st_ino
    except (FileNotFoundError, PermissionError):
        return 0


def _started(pid: int) -> int:
    """Return when a process was started; 0 when there is none of this number."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    # The program's name stands in parentheses and may hold anything, parentheses too.
    return int(text.rpartition(")")[2].split()[19])
