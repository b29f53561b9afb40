"""What a benchmark is: an object with a name, a description, a check and a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.row import Row


DRIVER = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Options:
    """How to run.

    Attributes:
        is_quick: Smaller sizes and fewer repeats: ends within 20 s.
        path: Directory for what must lie on a disk.
        threads: Copy threads of the cache and of its limit line.
        driver: Library of the CUDA driver.
        nixl_python: A Python that can import NIXL, to compare transfers with; None for none.
        endpoint: URL of an S3 service; empty for one that is started for the run.
        region: As that service calls it.
        bucket: There, which has to exist; empty for one that is made for the run.
        concurrency: Most S3 requests at a time.
        vllm_python: A Python that can import vLLM; None for none.
    """

    is_quick: bool
    path: Path
    threads: int
    driver: str = DRIVER
    nixl_python: Path | None = None
    endpoint: str = ""
    region: str = "us-east-1"
    bucket: str = ""
    concurrency: int = 16
    vllm_python: Path | None = None

    @property
    def repeats(self) -> int:
        """How often each pair is measured."""
        return 3 if self.is_quick else 7


class Case(Protocol):
    """One benchmark."""

    name: str
    description: str

    def why_not(self, options: Options) -> str:
        """Return why it cannot run here; empty when it can."""

    def run(self, options: Options) -> Iterator[Row]:
        """Measure; yields rows as they are done."""
