"""What is moved, and who moves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from kvx_bench.row import Sample


@dataclass(frozen=True, slots=True)
class Work:
    """A batch of blocks that goes from one process to the other.

    Attributes:
        is_write: Whether the one that asks for it has the bytes; else it gets them.
        block_bytes: Of each block.
        batch: Blocks.
    """

    is_write: bool
    block_bytes: int
    batch: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.block_bytes * self.batch

    @property
    def operation(self) -> str:
        """Return "read" or "write"."""
        return "write" if self.is_write else "read"

    def __str__(self) -> str:
        """Return "read 256 x 2MiB"."""
        return f"{self.operation} {self.batch} x {size_name(self.block_bytes)}"


class Baseline(Protocol):
    """One way to move bytes that is not kvx. Its memory is populated before it is run."""

    @property
    def name(self) -> str:
        """As rows call it."""

    @property
    def description(self) -> str:
        """What it does, in one line."""

    def why_not(self, work: Work) -> str:
        """Return why it cannot do this; empty when it can."""

    def run(self, work: Work) -> Sample:
        """Move the batch once; the CPU seconds are those of both processes."""

    def moves_all(self, work: Work) -> bool:
        """Move the batch once more, and return whether every byte arrived."""
