"""kvx moves and tiers the KV cache of language models.

Start with `TieredCache.open` for a cache, with `Agent` for reads and writes between processes;
`docs/ARCHITECTURE.md` says how the parts fit together.
"""

from kvx.buffers import MemoryKind
from kvx.cache.disk.inspect import describe as describe_disk
from kvx.cache.disk.inspect import iter_blocks as iter_disk_blocks
from kvx.cache.events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog
from kvx.cache.lease import Lease
from kvx.cache.reasons import MissReason
from kvx.cache.result import Location, Match, TierKind, TransferResult
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
from kvx.transfer.agents.agent import Agent, Quarantined
from kvx.transfer.agents.config import AgentConfig, TlsFiles
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.lease import BlockLease
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from kvx.transfer.agents.loop import Notification
from kvx.transfer.agents.metadata import PeerInfo
from kvx.transfer.agents.outcome import LinkOutcome, LinkResult
from kvx.transfer.agents.parts import AgentCloseReport
from kvx.transfer.agents.peer import Peer, RemoteBlocks
from kvx.transfer.agents.peer_state import (
    PeerChanged,
    PeerDown,
    PeerRestarted,
    PeerState,
    PeerUp,
)
from kvx.transfer.agents.prepared import PreparedTransfer
from kvx.transfer.agents.registration import Descriptors, Registration
from kvx.transfer.agents.sockets import socket_directory
from kvx.transfer.agents.transfers import LinkTransfer
from kvx.transfer.handle import Transfer, TransferState, wait_all
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.route import Explanation, Route, RouteState

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "AgentCloseReport",
    "AgentConfig",
    "AllBlocksCleared",
    "BlockLease",
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
    "Descriptors",
    "EventLog",
    "Explanation",
    "IncompatibleError",
    "KVLayout",
    "KvxError",
    "Lease",
    "LinkOutcome",
    "LinkResult",
    "LinkTransfer",
    "Location",
    "Match",
    "MemoryKind",
    "MemoryRegion",
    "MissReason",
    "Namespace",
    "Notification",
    "Peer",
    "PeerChanged",
    "PeerDown",
    "PeerInfo",
    "PeerLost",
    "PeerRestarted",
    "PeerState",
    "PeerUp",
    "PreparedTransfer",
    "Quarantined",
    "Registration",
    "RemoteBlocks",
    "RemoteLease",
    "Rights",
    "Route",
    "RouteState",
    "SharedKey",
    "StaleReference",
    "StorageError",
    "TierKind",
    "TieredCache",
    "TlsFiles",
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
    "socket_directory",
    "wait_all",
]
