"""What the worker has under way: loads and stores, and the transfers that they are made of."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    import kvx
    from kvx_vllm.specs import KvxBlocks, Run


@dataclass(slots=True)
class Part:
    """One transfer of a job.

    Attributes:
        run: What it moves.
        block_ids: The engine's blocks.
        hashes: Theirs.
        transfer: kvx's; None where it could not begin.
    """

    run: Run
    block_ids: npt.NDArray[np.int64]
    hashes: list[bytes]
    transfer: kvx.Transfer[kvx.TransferResult] | None


@dataclass(slots=True)
class Job:
    """A load or a store that vLLM waits for.

    Attributes:
        blocks: What was asked for.
        is_load: Which of the two.
        began_s: When, of the monotonic clock.
        parts: Its transfers.
    """

    blocks: KvxBlocks
    is_load: bool
    began_s: float = field(default_factory=time.monotonic)
    parts: list[Part] = field(default_factory=list)

    @property
    def direction(self) -> str:
        """What metrics call it."""
        return "load" if self.is_load else "store"

    @property
    def transfers(self) -> list[kvx.Transfer[kvx.TransferResult]]:
        """Those that have begun."""
        return [part.transfer for part in self.parts if part.transfer is not None]
