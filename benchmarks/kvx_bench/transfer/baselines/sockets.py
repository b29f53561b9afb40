"""Plain Python sockets: sendall and recv_into with memory that is there already."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvx_bench.row import median, percentiles_us
from kvx_bench.transfer.baselines import peer
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.cpu_clock import timed_with

if TYPE_CHECKING:
    from kvx_bench.row import Sample
    from kvx_bench.transfer.baselines.bench_memory import TwoMemories

_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
_BUFFERS_BYTES = (0, 256 << 10, 1 << 20, 4 << 20)
_WARM_UP = 200
_CHOOSING_BYTES = 32 << 20
_CHOOSING_ROUNDS = 5


def congestion_controls() -> tuple[str, ...]:
    """Return "" for the system's choice, then what every program may choose instead."""
    try:
        allowed = _ALLOWED.read_text().split()
    except OSError:
        return ("",)
    return ("", *allowed)


class SocketStream:
    """One stream to the second process of `memories`."""

    def __init__(
        self,
        memories: TwoMemories,
        name: str,
        *,
        is_unix: bool = False,
        buffer_bytes: int = 0,
        congestion: str = "",
    ) -> None:
        self.name = name
        size = f"{buffer_bytes >> 10} KiB socket buffers" if buffer_bytes else "default buffers"
        kind = "unix" if is_unix else f"tcp, {congestion or 'default'} congestion control"
        self.description = f"Python sockets, {kind}, {size}"
        self._memories = memories
        family = socket.AF_UNIX if is_unix else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            peer.set_up(listener, buffer_bytes, congestion)
            # An abstract name of the kernel's choosing: no file to remove.
            listener.bind("" if is_unix else ("127.0.0.1", 0))
            listener.listen(1)
            address = listener.getsockname()
            where = address.decode("latin-1") if is_unix else list(address)
            memories.child.ask(
                do="connect", address=where, buffer_bytes=buffer_bytes, congestion=congestion
            )
            self._stream, _ = listener.accept()
        peer.set_up(self._stream, 0, congestion)

    def close(self) -> None:
        """Hang up."""
        self._stream.close()

    def why_not(self, _work: Work) -> str:
        """It runs everywhere."""
        return ""

    def run(self, work: Work) -> Sample:
        """Move the batch; a write has ended when the other side said that it has all of it."""
        return timed_with(lambda: self._move(work), [self._memories.child.pid])

    def moves_all(self, work: Work) -> bool:
        """Move the batch once more and look."""
        return self._memories.arrives_apart(work, lambda: self._move(work))

    def _move(self, work: Work) -> None:
        what = peer.TAKE if work.is_write else peer.SEND
        self._stream.sendall(peer.HEADER.pack(what, work.block_bytes, work.batch))
        memory = self._memories.ours.data
        if work.is_write:
            peer.send_blocks(self._stream, memory, work.block_bytes, work.batch)
            peer.receive_exactly(self._stream, memoryview(bytearray(1)))
        else:
            peer.receive_blocks(self._stream, memory, work.block_bytes, work.batch)

    def round_trips_us(self, num_bytes: int, count: int) -> tuple[float, float]:
        """Return p50 and p99 of sending a message and receiving one as large."""
        rounds = count + _WARM_UP
        self._stream.sendall(peer.HEADER.pack(peer.ECHO, num_bytes, rounds))
        message = self._memories.ours.data[:num_bytes]
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            self._stream.sendall(message)
            peer.receive_exactly(self._stream, message)
            times.append(time.perf_counter() - began)
        return percentiles_us(times[_WARM_UP:])


class BestTcpStream:
    """The fastest of streams of every buffer size and congestion control, chosen for each work.

    Whoever uses plain sockets can set those, so what kvx is compared with has them set well. On
    loopback a control that paces, as bbr does, costs a good part of the rate.
    """

    name = "sockets"

    def __init__(self, memories: TwoMemories) -> None:
        self._memories = memories
        self._chosen: dict[Work, SocketStream] = {}
        self._streams: list[SocketStream] = []
        with contextlib.ExitStack() as made:
            for congestion in congestion_controls():
                for buffer_bytes in _BUFFERS_BYTES:
                    stream = SocketStream(
                        memories, self.name, buffer_bytes=buffer_bytes, congestion=congestion
                    )
                    made.callback(stream.close)
                    self._streams.append(stream)
            self._made = made.pop_all()
        self._latest = self._streams[0]

    @property
    def description(self) -> str:
        """The one that was chosen last."""
        return f"{self._latest.description}: the fastest of {len(self._streams)} settings"

    def close(self) -> None:
        """Hang up."""
        self._made.close()

    def why_not(self, _work: Work) -> str:
        """It runs everywhere."""
        return ""

    def run(self, work: Work) -> Sample:
        """Move the batch over the one that is best for it."""
        if work not in self._chosen:
            self._chosen[work] = self._choose(work)
        self._latest = self._chosen[work]
        return self._latest.run(work)

    def moves_all(self, work: Work) -> bool:
        """Move the batch once more and look."""
        return self._memories.arrives_apart(work, lambda: self.run(work))

    def round_trips_us(self, num_bytes: int, count: int) -> tuple[float, float]:
        """Return p50 and p99 of the stream with the lowest p50."""
        found = [one.round_trips_us(num_bytes, count) for one in self._streams]
        self._latest = self._streams[found.index(min(found))]
        return min(found)

    def _choose(self, work: Work) -> SocketStream:
        batch = max(1, min(work.batch, _CHOOSING_BYTES // work.block_bytes))
        probe = Work(work.is_write, work.block_bytes, batch)
        for stream in self._streams:
            stream.run(probe)
        # In turn, so that a slow moment of the machine does not choose.
        rounds = [[one.run(probe).wall_s for one in self._streams] for _ in range(_CHOOSING_ROUNDS)]
        costs = [median(times) for times in zip(*rounds, strict=True)]
        return self._streams[costs.index(min(costs))]
