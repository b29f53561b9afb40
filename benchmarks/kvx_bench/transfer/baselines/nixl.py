"""NIXL alone, between two of its own agents, in an environment that has it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from kvx.errors import UnavailableError
from kvx_bench.row import Sample, percentiles_us
from kvx_bench.transfer.child import Child
from kvx_bench.transfer.cpu_clock import process_cpu_s

if TYPE_CHECKING:
    from pathlib import Path

    from kvx_bench.transfer.baselines.work import Work

_PROGRAM = "kvx_bench.transfer.baselines.nixl_program"
_FILL = 0x5A


class Nixl:
    """UCX as it chooses itself (on one host: process_vm_readv or shared memory), or held to tcp."""

    def __init__(self, python: Path, num_bytes: int, *, transports: str = "") -> None:
        """Start both processes.

        Args:
            python: One that can import `nixl_cu13`.
            num_bytes: Of memory on each side.
            transports: What UCX may use, as UCX_TLS has it; "" for its own choice.

        Raises:
            UnavailableError: That Python has no NIXL, or NIXL does not start.
        """
        self.name = f"nixl-{transports or 'auto'}"
        self.description = "raw NIXL over UCX, one prepared request posted and polled; "
        self.description += f"UCX_TLS={transports}" if transports else "UCX chooses"
        spec = find_spec(_PROGRAM)
        assert spec is not None, "part of this package"
        assert spec.origin is not None, "a file"
        # env(1) sets them for those processes alone.
        settings = ["NIXL_LOG_LEVEL=WARN", *([f"UCX_TLS={transports}"] if transports else [])]
        self._child = Child(["env", *settings, str(python), spec.origin, "initiator"])
        try:
            self._child.ask(do="open", name="initiator", num_bytes=num_bytes)
            self._pids = [self._child.pid, *self._child.ask(do="pids")["pids"]]
        except UnavailableError:
            self._child.close()
            raise

    def __enter__(self) -> Self:
        """Nothing but the agents."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End both processes."""
        self.close()

    def close(self) -> None:
        """End both processes."""
        self._child.close()

    def why_not(self, _work: Work) -> str:
        """It was started, so it runs."""
        return ""

    def run(self, work: Work) -> Sample:
        """Post the batch and poll until it is done; its own clock, so the asking is not in it."""
        before = self.cpu_s()
        answer = self._child.ask(
            do="run", is_write=work.is_write, block_bytes=work.block_bytes, batch=work.batch
        )
        return Sample(float(answer["wall_s"]), self.cpu_s() - before)

    def round_trips_us(self, num_bytes: int, count: int) -> tuple[float, float]:
        """Return p50 and p99 of reading one block."""
        answer = self._child.ask(do="latencies", num_bytes=num_bytes, count=count)
        return percentiles_us(list(answer["times"]))

    def posts(self, block_bytes: int, batch: int, count: int) -> tuple[list[float], list[float]]:
        """Return how long posting takes: described anew each time, and prepared once."""
        answer = self._child.ask(do="post", block_bytes=block_bytes, batch=batch, count=count)
        return answer["anew_s"], answer["prepared_s"]

    def cpu_s(self) -> float:
        """Return the CPU seconds that both processes have used."""
        return sum(map(process_cpu_s, self._pids))

    def moves_all(self, work: Work) -> bool:
        """Move the batch once more, and return whether all of its bytes came."""
        ours = {"do": "fill", "num_bytes": work.num_bytes, "fill": _FILL}
        theirs = ours | {"fill": ~_FILL & 0xFF}
        if not work.is_write:
            ours, theirs = theirs, ours
        self._child.ask(**ours)
        self._child.ask(do="theirs", request=theirs)
        self.run(work)
        look: dict[str, object] = {"do": "look", "num_bytes": work.num_bytes}
        seen = (
            self._child.ask(do="theirs", request=look) if work.is_write else self._child.ask(**look)
        )
        return bool(seen["lowest"] == seen["highest"] == _FILL)
