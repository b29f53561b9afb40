"""kvx moves and tiers the KV cache of language models.

Start with `TieredCache.open`; `docs/ARCHITECTURE.md` says how the parts fit together.
"""

from kvx.buffers import MemoryKind
from kvx.cache.disk.inspect import describe as describe_disk
from kvx.cache.disk.inspect import iter_blocks as iter_disk_blocks
from kvx.cache.events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog
from kvx.cache.lease import Lease
from kvx.cache.reasons import MissReason
from kvx.cache.result import Match, TierKind, TransferResult
from kvx.cache.space import CacheSpace
from kvx.cache.tiered import TieredCache
from kvx.cache.upkeep import CloseReport
from kvx.config import CacheConfig
from kvx.errors import (
    CapacityError,
    ConfigError,
    CorruptBlock,
    IncompatibleError,
    KvxError,
    PeerLost,
    StaleReference,
    StorageError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnavailableError,
    UsageError,
)
from kvx.layout import BlockSelection, BlockView, KVLayout
from kvx.namespace import Namespace
from kvx.transfer.handle import Transfer, TransferState, wait_all
from kvx.transfer.memory import MemoryRegion

__version__ = "0.1.0"

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockSelection",
    "BlockStored",
    "BlockView",
    "CacheConfig",
    "CacheSpace",
    "CapacityError",
    "CloseReport",
    "ConfigError",
    "CorruptBlock",
    "EventLog",
    "IncompatibleError",
    "KVLayout",
    "KvxError",
    "Lease",
    "Match",
    "MemoryKind",
    "MemoryRegion",
    "MissReason",
    "Namespace",
    "PeerLost",
    "StaleReference",
    "StorageError",
    "TierKind",
    "TieredCache",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "TransferResult",
    "TransferState",
    "TransferTimeout",
    "UnavailableError",
    "UsageError",
    "__version__",
    "describe_disk",
    "iter_disk_blocks",
    "wait_all",
]
