"""How a scheduler asks all ranks of its engine; a block is there only if every rank has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import kvx
from kvx_vllm.rank_cache import rank_cache_here

if TYPE_CHECKING:
    from collections.abc import Sequence


class Ranks(Protocol):
    """All ranks of one engine."""

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location | None:
        """Return where blocks are that all ranks hold; None while that is not known."""

    def reset(self) -> None:
        """Let nothing be found that was stored before."""

    def close(self) -> None:
        """Ask no more."""


class OneRankHere:
    """The only rank, in this process."""

    def __init__(self, engine_id: str) -> None:
        """Find it.

        Raises:
            kvx.UnavailableError: It is not in this process.
        """
        found = rank_cache_here(engine_id, 0)
        if found is None:
            raise kvx.UnavailableError(f"no worker of engine {engine_id} runs in this process")
        self._rank = found

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location:
        """Return where blocks are."""
        return self._rank.locate(group, hashes, first)

    def reset(self) -> None:
        """Let nothing be found that was stored before."""
        self._rank.reset()

    def close(self) -> None:
        """Leave it to its worker."""
