"""The exceptions of the reference engine.

    EngineError
    |- ModelFormatError(ValueError)   a model folder is damaged, or holds what is not supported
    |- BlocksExhausted                the KV cache has too few free blocks; free some and retry
    `- DamagedCacheError              the logits are not finite: the KV cache holds damaged values

Wrong arguments of a call raise ValueError.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything the engine raises on its own account."""


class ModelFormatError(EngineError, ValueError):
    """A file of the model folder is damaged, missing, or asks for what is not supported."""


class BlocksExhausted(EngineError):
    """There are not enough free blocks.

    Attributes:
        needed: Blocks asked for.
        available: Blocks that are free.
    """

    def __init__(self, *, needed: int, available: int) -> None:
        """Keep both counts beside the message."""
        super().__init__(
            f"{needed} blocks are needed and {available} are free: "
            "shorten the prompt, ask for fewer tokens, or load the engine with more blocks"
        )
        self.needed = needed
        self.available = available


class DamagedCacheError(EngineError):
    """The model computed logits that are not finite, which only damaged KV values cause."""
