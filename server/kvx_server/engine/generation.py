"""What a generation returns, and the seam through which it reuses KV computed earlier."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class PrefixCache(Protocol):
    """Keeps blocks of KV outside of the engine, by the hash of their tokens.

    Both calls move bytes of the engine's `block_bytes_view` and are done with them when they
    return: the engine may overwrite the blocks from then on.
    """

    def load(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> int:
        """Fill leading blocks, `block_ids[i]` with the block named `hashes[i]`.

        Returns:
            How many leading blocks are filled now; later blocks may hold anything.
        """

    def save(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Keep a copy of blocks, `block_ids[i]` under the name `hashes[i]`."""


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of one prompt.

    Attributes:
        tokens: Generated tokens, without the stop token.
        finish_reason: Why there are no more.
        num_prompt_tokens: Length of the prompt.
        num_reused_tokens: Leading tokens of the prompt whose KV came from the prefix cache.
        num_prefill_tokens: Tokens of the prompt that were computed.
        load_s: Time in `PrefixCache.load`, seconds.
        ttft_s: Time to the first token, loading included, seconds.
        decode_s: Time from the first token to the last, saving excluded, seconds.
    """

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_reused_tokens: int
    num_prefill_tokens: int
    load_s: float
    ttft_s: float
    decode_s: float
