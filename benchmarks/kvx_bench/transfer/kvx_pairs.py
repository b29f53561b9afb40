"""The ways of kvx that take part in the standard rows, each a pair of agents of its own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvx.errors import KvxError
from kvx_bench.transfer.baselines.limits import Absent
from kvx_bench.transfer.pair.opening import PairOptions, open_pair

if TYPE_CHECKING:
    from pathlib import Path

    from kvx_bench.transfer.pair.pair import Pair


@dataclass(frozen=True, slots=True)
class Way:
    """One of them.

    Attributes:
        backend: As agents list it.
        variant: What is added to the keys of its rows; empty for the defaults of an agent.
        copy_threads: Of each agent; 0 for its default.
        note: What sets it apart.
    """

    backend: str
    variant: str = ""
    copy_threads: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        """As a contestant."""
        return f"kvx-{self.backend}{self.variant}"


WAYS = (
    Way("shm"),
    # What kvx is compared with copies on one thread.
    Way("shm", ".one-thread", copy_threads=1, note="one copy thread"),
    Way("tcp"),
    Way("nixl"),
)


class KvxPairs:
    """All of them, opened once for all sizes of a run.

    Attributes:
        pairs: Those that are here.
        absent: The others.
    """

    def __init__(
        self, num_bytes: int, *, driver: str, nixl_python: Path | None, ways: tuple[Way, ...] = WAYS
    ) -> None:
        """Populate `num_bytes` on both sides of each; NIXL is loaded by a Python that has it."""
        self.pairs: dict[Way, Pair] = {}
        self.absent: list[Absent] = []
        with contextlib.ExitStack() as made:
            for way in ways:
                python = nixl_python if way.backend == "nixl" else None
                options = PairOptions(way.copy_threads, driver, python=python)
                try:
                    pair = made.enter_context(open_pair(way.backend, options))
                    pair.map(num_bytes)
                except (KvxError, OSError) as error:
                    self.absent.append(Absent(way.backend + way.variant, str(error)))
                else:
                    self.pairs[way] = pair
            self._made = made.pop_all()

    def __enter__(self) -> Self:
        """Nothing but the pairs."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End their processes."""
        self._made.close()
