"""Everything there is to be compared with, opened once for all sizes of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from kvx.errors import UnavailableError
from kvx_bench.transfer.baselines.bench_memory import TwoMemories
from kvx_bench.transfer.baselines.iperf import Iperf
from kvx_bench.transfer.baselines.nixl import Nixl
from kvx_bench.transfer.baselines.one_copy import VmCopy, mapped_copies
from kvx_bench.transfer.baselines.sockets import BestTcpStream, SocketStream

if TYPE_CHECKING:
    from pathlib import Path

    from kvx_bench.transfer.baselines.work import Baseline, Work

# What every figure of one host can be held against: one copy, with the fastest stores.
TOP = "memfd-streaming"
_WHOLE_COPIES_FROM = 1 << 20
_NIXL_TRANSPORTS = ("", "tcp")


def limits_of(backend: str, block_bytes: int) -> tuple[str, ...]:
    """Return what a way of kvx is judged by, and then what else is worth showing beside it.

    Where blocks are small what counts is what each of them costs: so what a program in Python does
    without kvx is the measure there, and what a copy of all of them costs is shown beside it.
    """
    match backend:
        case "shm":
            return ("memfd-memcpy" if block_bytes >= _WHOLE_COPIES_FROM else "memfd-python", TOP)
        case "tcp":
            return ("sockets-default", "sockets")
        case "nixl":
            return ("nixl-auto", "nixl-tcp")
    return ()


class Echo(Protocol):
    """A baseline whose smallest exchange is worth a row."""

    @property
    def name(self) -> str:
        """As rows call it."""

    @property
    def description(self) -> str:
        """What it does, in one line."""

    def round_trips_us(self, num_bytes: int, count: int) -> tuple[float, float]:
        """Return p50 and p99 of `count` exchanges."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A baseline that is not here.

    Attributes:
        name: It.
        reason: Why, and how to get it.
    """

    name: str
    reason: str


class Limits:
    """The baselines of a run, with one second process for most of them.

    Attributes:
        baselines: Those that are here.
        absent: The others.
        nixl: Those of the baselines that are raw NIXL.
    """

    def __init__(self, num_bytes: int, *, nixl_python: Path | None) -> None:
        """Populate `num_bytes` several times over, and choose the settings of the sockets."""
        self.baselines: list[Baseline] = []
        self.absent: list[Absent] = []
        self.nixl: list[Nixl] = []
        self._echoes: list[Echo] = []
        with contextlib.ExitStack() as made:
            memories = made.enter_context(TwoMemories(num_bytes))
            self.baselines += mapped_copies(memories)
            self.baselines.append(VmCopy(memories))
            streams = [
                made.enter_context(contextlib.closing(one))
                for one in (
                    BestTcpStream(memories),
                    SocketStream(memories, "sockets-default"),
                    SocketStream(memories, "unix", is_unix=True),
                )
            ]
            self.baselines += streams
            self._echoes += streams
            self.baselines.append(Iperf())
            if nixl_python is None:
                self.absent.append(
                    Absent("nixl", "no --nixl-python; name a Python that can import nixl_cu13")
                )
            else:
                for transports in _NIXL_TRANSPORTS:
                    self._open_nixl(made, nixl_python, num_bytes, transports)
            self._made = made.pop_all()

    def __enter__(self) -> Self:
        """Nothing but the baselines."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End their second processes."""
        self._made.close()

    @property
    def echoes(self) -> tuple[Echo, ...]:
        """Those that can say how long a small exchange takes."""
        return tuple(self._echoes)

    def able(self, work: Work) -> list[Baseline]:
        """Return those that can do this work; why the others cannot is in `absent` afterwards."""
        found = []
        for baseline in self.baselines:
            reason = baseline.why_not(work)
            if not reason:
                found.append(baseline)
            elif all(one.name != baseline.name for one in self.absent):
                self.absent.append(Absent(baseline.name, reason))
        return found

    def _open_nixl(
        self, made: contextlib.ExitStack, python: Path, num_bytes: int, transports: str
    ) -> None:
        try:
            nixl = made.enter_context(Nixl(python, num_bytes, transports=transports))
        except (UnavailableError, OSError) as error:
            self.absent.append(Absent(f"nixl-{transports or 'auto'}", str(error)))
            return
        self.baselines.append(nixl)
        self.nixl.append(nixl)
        self._echoes.append(nixl)
