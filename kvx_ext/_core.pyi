"""
Native core of kvx: memory, copies with checksums, block index and file I/O.
"""

from collections.abc import Sequence
import enum
from typing import Annotated

import numpy
from numpy.typing import NDArray


class StopFlag:
    """Asks a running `HostRegion.prefault` to return early."""

    def __init__(self) -> None: ...

    def set(self) -> None:
        """Raise the flag; it cannot be lowered. Thread-safe."""

class HostRegion:
    """
    Page-aligned host memory, with huge pages asked for. Freed when the last array on it dies.
    """

    def __init__(self, bytes: int, is_shared: bool = False, numa_node: int = -1) -> None:
        """
        Map `bytes` (rounded up to 4096); `is_shared` backs it with a memfd. Pages arrive on first touch or by `prefault`. Raises CapacityError when the kernel refuses.
        """

    @property
    def address(self) -> int:
        """
        Address of the first byte; a multiple of 4096, of 2 MiB for regions that big.
        """

    @property
    def bytes(self) -> int:
        """Size after rounding up."""

    @property
    def fd(self) -> int:
        """File descriptor of a shared region, else -1."""

    @property
    def prefaulted_bytes(self) -> int:
        """Progress of `prefault`; may be read from any thread meanwhile."""

    def prefault(self, threads: int, stop: StopFlag | None = None) -> bool:
        """
        Populate all pages on `threads` threads without the GIL. False when stopped early.
        """

    def array(self) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,))]:
        """
        The whole region as a writable (bytes,) uint8 array that keeps it alive.
        """

def numa_node_count() -> int:
    """NUMA nodes of this machine; at least 1."""

def checksum_kernels() -> list[str]:
    """Names of the checksum kernels this CPU can run, the one in use first."""

def block_checksums(blocks: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
    """
    Checksums of (n, block_bytes) uint8 blocks under (n, 16) uint8 keys as (n,) uint64. One thread, without the GIL. Source: docs/formats/nvme.md.
    """

def row_checksums(memory: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], rows: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)] | None = None) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
    """
    Checksums of blocks where they lie in `memory`: rows is (n, 4) int64 of offset, stride, count, bytes; keys (n, 16) uint8, None for zeros. One thread, without the GIL. Source: kvx_ext/include/kvx/row_checksums.h.
    """

def crc64(source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], state: int = 0, kernel: str = '') -> int:
    """
    Continue the bare CRC-64/NVME register `state` over `source` with the kernel named.
    """

def copy_with_crc64(target: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], state: int = 0, is_streaming: bool = True, kernel: str = '') -> int:
    """
    Copy and checksum in one pass; returns the new register. The ranges must not overlap.
    """

def copy_only(target: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], is_streaming: bool = True, kernel: str = '') -> None:
    """
    Copy with the same stores and no checksum: the limit line of the benchmarks.
    """

def gather_into_body(body: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], offsets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], block_bytes: int) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
    """
    Copy `block_bytes` from each of the (n,) int64 host addresses to its (n,) int64 offset in the (k,) uint8 body; returns the (n,) uint64 checksums of what was copied under the (n, 16) uint8 keys. One thread, without the GIL. Raises UsageError for a block beyond the body; nothing was copied then.
    """

def scatter_from_body(body: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], offsets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], block_bytes: int) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
    """
    The other way: from the body, which may be read-only, to the addresses. Judges no checksum.
    """

def block_keys(hashes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], fingerprint: bytes) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]:
    """
    Keys of (n, k) uint8 hashes, 1 <= k <= 128, as (n, 16) uint8: for each row hashlib.blake2b(row, key=fingerprint, digest_size=16). Source: RFC 7693.
    """

def plan_copies(direction: str, targets: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], sources: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], bytes: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], calibration: Annotated[NDArray[numpy.float64], dict(shape=(3, 4, 11), order='C', device='cpu', writable=False)] | None = None, plain: Annotated[NDArray[numpy.float64], dict(shape=(3), order='C', device='cpu', writable=False)] | None = None, *, has_batch: bool = True, has_kernels: bool = False, staging_bytes: int = 0, pinned: Annotated[NDArray[numpy.uint64], dict(shape=(None, 3), order='C', device='cpu', writable=False)] | None = None, batch_runs_max: int = 8192) -> dict[str, object]:
    """
    Plan the copy of (n,) uint64 runs; `direction` is "h2d", "d2h" or "d2d". Copies nothing.

    `calibration` (3, 4, 11) float64 GB/s by direction, method and size, `plain` (3,); None: the published defaults. `pinned` (m, 3) uint64 rows of base, bytes and piece bytes, by base.
    Returns the merged runs as `targets`, `sources`, `bytes`; the calls as `methods` (k,) uint8 and `calls` (k, 5) int64 rows of first, count, target stride, source stride, bytes; `total_bytes`. No run may be empty, no target may overlap another one or a source. Source: kvx/copy_plan.h.
    """

def time_plan_copies(direction: str, targets: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], sources: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], bytes: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], calibration: Annotated[NDArray[numpy.float64], dict(shape=(3, 4, 11), order='C', device='cpu', writable=False)] | None = None, plain: Annotated[NDArray[numpy.float64], dict(shape=(3), order='C', device='cpu', writable=False)] | None = None, *, has_batch: bool = True, has_kernels: bool = False, staging_bytes: int = 0, pinned: Annotated[NDArray[numpy.uint64], dict(shape=(None, 3), order='C', device='cpu', writable=False)] | None = None, batch_runs_max: int = 8192, repeats: int = 1000) -> float:
    """
    For benchmarks: nanoseconds that `plan_copies` takes natively into a plan used before, averaged over `repeats`.
    """

def predicted_copy_ns(direction: str, method: str, bytes: int, calibration: Annotated[NDArray[numpy.float64], dict(shape=(3, 4, 11), order='C', device='cpu', writable=False)] | None = None, plain: Annotated[NDArray[numpy.float64], dict(shape=(3), order='C', device='cpu', writable=False)] | None = None) -> float:
    """
    What the planner takes one run of `bytes` to cost by a method, without the cost of a call; infinite where the method was not measured.
    """

def default_copy_calibration() -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """
    The published numbers that planning starts from: GB/s (3, 4, 11) and of plain copies (3,).
    """

def copy_methods() -> tuple[str, ...]:
    """Names of the methods, in order."""

def copy_directions() -> tuple[str, ...]:
    """Names of the directions, in order."""

ROWS_CALL_NS: float = 2000.0

STAGED_CALL_NS: float = 20000.0

class LayerProgress:
    """
    How many leading layers of one transfer have arrived, over all jobs that bring them. Thread-safe.
    """

    def __init__(self, layers: int, device: Device | None) -> None:
        """Streams can wait with a device. Raises UsageError."""

    @property
    def layers(self) -> int:
        """How many there are."""

    def ready(self) -> int:
        """How many leading ones have arrived."""

    def seal(self) -> None:
        """No more jobs will join: layers may count from now on."""

    def finish(self) -> None:
        """The transfer is over: everybody goes on."""

    def wait(self, layers: int, timeout_s: float) -> bool:
        """
        Wait without the GIL until so many have arrived. False when time was up.
        """

    def wait_on(self, stream: int, layers: int) -> None:
        """
        Make a CUstream wait until so many have arrived. Raises UsageError, UnavailableError.
        """

class DlpackTensor:
    """
    What a DLPack capsule describes; its memory is given back when this dies.
    """

    def __init__(self, capsule: object) -> None:
        """
        Consume a `dltensor` or `dltensor_versioned` capsule. Raises UsageError when it was consumed before, or its elements are no whole bytes.
        """

    @property
    def address(self) -> int:
        """Address of the first element, host or device."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements."""

    @property
    def strides_bytes(self) -> tuple[int, ...]:
        """Bytes from one element to the next, for each dimension."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""

    @property
    def device(self) -> tuple[int, int]:
        """DLDeviceType and number."""

    @property
    def is_read_only(self) -> bool:
        """Whether the producer forbids writing; older ones cannot say so."""

    @property
    def is_copy(self) -> bool:
        """Whether the producer made a copy, so that this is not its memory."""

class EvictionPolicy(enum.IntEnum):
    """Whom to evict; see `include/kvx/eviction_policy.h`."""

    LRU = 0
    """Least recently touched."""

    FIFO = 1
    """Oldest commit."""

    LFU = 2
    """Least often touched, then least recently."""

    LFU_WITH_RECENCY = 3
    """
    Least bit width of a frequency that is halved every 8 * slots accesses.
    """

    S3FIFO = 4
    """Yang et al., SOSP 2023."""

class ReserveOutcome(enum.IntEnum):
    """What `BlockIndex.reserve` and `insert` did with a key."""

    RESERVED = 0
    """The slot is the caller's."""

    EXISTS = 1
    """Committed already."""

    IN_FLIGHT = 2
    """Somebody else is writing it."""

    NO_SPACE = 3
    """Every slot is pinned, dirty or reserved."""

    QUOTA = 4
    """The owner is at its limit, its blocks are held."""

class RemovalReason(enum.IntEnum):
    """Why a block left; what `MissHistory.why` answers."""

    NEVER_STORED = 0
    """Nothing is remembered of the key."""

    EVICTED = 1
    """To make room."""

    EXPIRED = 2
    """Past its time to live."""

    DROPPED = 3
    """The caller asked."""

    CORRUPT = 4
    """Its bytes failed their checksum."""

    RETIRED = 5
    """Its slot was taken out of the pool."""

    CLEARED = 6
    """The whole index was emptied."""

    FAILED = 7
    """The write that should have filled it failed."""

    REPLACED = 8
    """Other bytes took its place."""

class MissHistory:
    """
    Why blocks left: 4 bytes a removal, the last `capacity / 2` right in more than 99% of cases. Thread-safe; several indexes may write into one.
    """

    def __init__(self, capacity: int) -> None:
        """Remember about `capacity` removals. Raises UsageError, CapacityError."""

    def why(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,))]:
        """
        Why (n, 16) uint8 keys left, as (n,) uint8 of RemovalReason; 0 where nothing is known.
        """

    @property
    def capacity(self) -> int:
        """Removals it has room for."""

    @property
    def memory_bytes(self) -> int:
        """What it takes."""

class BlockIndex:
    """
    Which block is in which slot of one pool: slot table, hash map and eviction order in one.

    A slot is free, reserved (being written), committed (visible), or doomed (removed while
    pinned). References {slot, generation, key} name one life of a slot; stale ones are ignored
    and said so, row by row. Earlier keys of a batch end up more recent than later ones.
    Keys are (n, 16) uint8, slots int64 (-1: none), generations uint32, checksums uint64,
    times milliseconds of any one clock. Thread-safe: one lock a batch, without the GIL.
    The full manual is `kvx_ext/include/kvx/block_index.h`.
    """

    def __init__(self, policy: EvictionPolicy, history: MissHistory | None = None) -> None:
        """
        An index without slots; why blocks leave is written to `history` if there is one.
        """

    def add_slots(self, first: int, count: int) -> None:
        """
        Make slots first..first+count-1 free. Memory is taken for every number from 0 on. Raises UsageError when one is there already, CapacityError without memory.
        """

    def retire_slots(self, first: int, count: int) -> bool:
        """
        Forget the blocks in a run of slots and the slots. False, and nothing done, when one of them is pinned or being written. Raises UsageError when one is not in the pool.
        """

    def reserve(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], owner: int, is_dirty: bool, ttl_s: int, now_ms: int) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None,))], Annotated[NDArray[numpy.int64], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]]:
        """
        Find slots for new blocks, free ones first, then by eviction; `ttl_s` 0 never expires.

        Returns (outcomes (n,) uint8 of ReserveOutcome, slots, generations, evicted (m, 16)
        uint8 keys that had to go). Slots are those of RESERVED and EXISTS rows, else -1.
        Raises UsageError beyond 65535 owners.
        """

    def commit(self, slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Make reserved blocks visible; (n,) bool, False where the reservation no longer stood.
        """

    def abort(self, slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Give reserved slots back; (n,) bool, False where the reservation no longer stood.
        """

    def insert(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], owner: int, ttl_s: int, now_ms: int) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None,))], Annotated[NDArray[numpy.int64], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]]:
        """
        `reserve` and `commit` in one call, returning what `reserve` does. Blocks of one batch do not evict one another.
        """

    def match(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], now_ms: int, touch: bool, pin: bool) -> tuple[int, Annotated[NDArray[numpy.int64], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint64], dict(shape=(None,))]]:
        """
        Find the longest prefix that is here: (count, slots, generations, checksums), arrays of `count` rows. `touch` counts as a use; what is found with `pin` must be unpinned. Raises UsageError, and pins nothing, beyond 65535 pins of one block.
        """

    def lookup(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], now_ms: int, touch: bool, pin: bool) -> tuple[Annotated[NDArray[numpy.bool_], dict(shape=(None,))], Annotated[NDArray[numpy.int64], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint64], dict(shape=(None,))]]:
        """
        Find every key: (is_found (n,) bool, slots, generations, checksums); -1, 0, 0 in rows that are not here. Otherwise as `match`.
        """

    def match_many(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], prefix_lengths: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], now_ms: int) -> Annotated[NDArray[numpy.int64], dict(shape=(None,))]:
        """
        Length found of each of several prefixes laid end to end, (m,) int64, without touch, pin or hit counters. Raises UsageError when the lengths do not add up to the keys.
        """

    def inspect(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], now_ms: int) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,))]:
        """
        What the index knows of every key, (n,) uint8: 0 absent, 1 held, 2 expired, 3 being written. For explaining misses: counts as no use.
        """

    def validate(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Whether references still name the same block, (n,) bool: ask before and after copying bytes without a pin. True for a removed block until its last pin goes.
        """

    def pin(self, slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Keep committed blocks from being evicted or reused, counted; (n,) bool, False where the reference is stale or the block has 65535 pins.
        """

    def unpin(self, slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Undo one pin each; (n,) bool, False where the reference is stale or nothing pins it.
        """

    def lease(self, slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], expires_ms: int) -> int:
        """
        Pin all blocks until `expires_ms` (0: until released) and return the lease's number. Raises StaleReference, and pins nothing, when one of them is gone.
        """

    def release(self, lease_id: int) -> bool:
        """
        Drop a lease's pins; False when it had expired or been released before.
        """

    def lease_is_live(self, lease_id: int, now_ms: int) -> bool:
        """Whether a lease still holds its blocks."""

    def expire(self, now_ms: int, slots_max: int) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]:
        """
        Drop the pins of expired leases, then look at up to `slots_max` slots, from where the last call stopped, and remove expired blocks: their (m, 16) uint8 keys.
        """

    def remove(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], reason: int) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None, None))], Annotated[NDArray[numpy.int64], dict(shape=(None,))]]:
        """
        Forget blocks for the RemovalReason given; ((m, 16) keys that were here, their slots). A pinned one is invisible at once and its slot free after the last unpin; of one being written, the commit will fail.
        """

    def clear(self) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None, None))], Annotated[NDArray[numpy.int64], dict(shape=(None,))]]:
        """Forget every block, as `remove`."""

    def mark_clean(self, slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Blocks were flushed and may be evicted once unpinned; (n,) bool, False where stale.
        """

    def take_dirty(self, count: int) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None, None))], Annotated[NDArray[numpy.int64], dict(shape=(None,))], Annotated[NDArray[numpy.uint32], dict(shape=(None,))], Annotated[NDArray[numpy.uint64], dict(shape=(None,))]]:
        """
        Up to `count` of the coldest dirty blocks that nobody flushes, pinned: (keys, slots, generations, checksums). Owed: `mark_clean` where the write went well, `unpin` always.
        """

    def set_owner_limit(self, owner: int, slots_max: int) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]:
        """
        Let an owner hold at most `slots_max` slots (-1: no limit); evicts down to it as far as blocks may go and returns their (m, 16) uint8 keys. Raises UsageError.
        """

    def owner_used(self, owner: int) -> int:
        """Slots an owner holds: reserved, committed and doomed."""

    def restore(self, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], slots: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], generations: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], freqs: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], expiry_s: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], owners: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """
        Commit blocks whose bytes are in their slots already, coldest first; `freqs` uint8, `expiry_s` int64 seconds (0: never), `owners` int32. (n,) bool, False where the slot is not free, the key is here already or the owner at its limit.
        """

    def snapshot(self) -> dict[str, numpy.ndarray]:
        """
        All committed blocks, coldest first: keys, slots, generations, checksums, freqs, ticks (of the last move to a hot end), expiry_s, owners, pins, dirty.
        """

    def stats(self) -> dict[str, int]:
        """
        Numbers of slots by state, counters since the start, and memory_bytes (all but the history).
        """

    def check_integrity(self) -> None:
        """
        Raise CorruptBlock naming the first violated invariant. O(slots); for tests and doctor.
        """

    @property
    def num_free(self) -> int:
        """Slots that are free now."""

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""

class Failpoints:
    """
    Faults on purpose in file I/O and copies, for tests. Thread-safe; rules may change while I/O runs.
    """

    def __init__(self) -> None:
        """Start without rules."""

    def set(self, operation: str, action: str, *, after: int = 0, count: int = -1, probability: float = 1.0, seed: int = 0, delay_s: float = 0.0, ignores_cancel: bool = False, torn_reports_error: bool = False) -> None:
        """
        Make file operations go wrong; a rule for the same operation and action is replaced.

        Rules are asked in the order they were set and the first that hits decides.

        Args:
            operation: "read", "write", "sync", "any" of these, or "copy" (one block on a copy thread;
                delay, hang, flip).
            action: "eio", "enospc" (fail, nothing moves); "short" (half moves, then a short transfer);
                "delay" (starts `delay_s` late); "hang" (does not start until clear()); "torn" (some
                512-byte sectors of a write keep what they held); "flip" (one bit is wrong, success);
                "drop" (nothing moves, success).
            after: Matching operations that pass first.
            count: Operations to spoil, -1 for all.
            probability: Of each, 0..1.
            seed: Decides the probability, the bit and the sectors.
            delay_s: For "delay", seconds.
            ignores_cancel: For "hang": cancelling and closing do not end it, as on a dying device.
            torn_reports_error: For "torn": fail with EIO instead of claiming success.

        Raises:
            UsageError: An unknown name, a value out of range, or a pair that makes no sense (torn read).
        """

    def clear(self) -> None:
        """Drop all rules and let everything that hangs go on. The counters stay."""

    def hits(self) -> dict[str, int]:
        """Return how many operations each action has spoiled so far."""

def probe_io_uring() -> str:
    """Return why io_uring cannot be used here; empty when it works."""

class DeviceMemory:
    """
    Memory of a device, freed by `close` or with the last reference; no copy on it may be in flight then. Keeps the device.
    """

    @property
    def address(self) -> int:
        """Address of the first byte, of the device."""

    @property
    def bytes(self) -> int:
        """Size; of exportable memory after rounding up."""

    @property
    def is_exportable(self) -> bool:
        """Whether it is shared by file descriptor rather than by handle."""

    @property
    def device(self) -> int:
        """Number of its device; -1 for the emulation."""

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """The memory as (bytes,) uint8 for libraries that use CUDA."""

    def __enter__(self) -> DeviceMemory:
        """Nothing but itself."""

    def __exit__(self, *exception: object) -> None:
        """Close it."""

    def close(self) -> None:
        """
        Free it. What uses it afterwards is undefined. May wait for the device.
        """

class PinnedRange:
    """
    Host memory that is being registered with a device; unregistered by `close` or with the last reference. The caller keeps the memory itself.
    """

    @property
    def pinned_bytes(self) -> int:
        """Bytes registered so far."""

    @property
    def bytes(self) -> int:
        """Bytes in all."""

    def wait(self, timeout_s: float) -> bool:
        """
        Wait without the GIL until every piece was tried; False when time is up. Raises what the driver said of the first piece that it refused; copies there work all the same.
        """

    def __enter__(self) -> PinnedRange:
        """Nothing but itself."""

    def __exit__(self, *exception: object) -> None:
        """Close it."""

    def close(self) -> None:
        """
        Unregister it. No copy on it may be in flight. Waits for the pinning thread.
        """

class StreamMark:
    """A point in a stream, which copies can be told to follow."""

    def is_reached(self) -> bool:
        """
        Whether the work before it has ended; never blocks. Raises TransferError when the device has failed.
        """

class Gate:
    """A counter that streams can wait for; it only grows."""

    def advance(self, value: int) -> None:
        """
        Raise the counter to `value`, if it is lower. Thread-safe, does not block.
        """

    @property
    def value(self) -> int:
        """The counter."""

    def wait_on(self, stream: int, value: int) -> str:
        """
        Make a stream wait until the counter has reached `value`: empty, or why the driver cannot, which is no error. Raises UsageError for the null stream.
        """

class Device:
    """
    A GPU, or host memory that plays one. What it makes keeps it. Thread-safe.
    """

    def info(self) -> dict[str, object]:
        """What the device is and can do."""

    def close(self) -> None:
        """
        Let go of the device; what it made keeps it open. Later calls raise UsageError.
        """

    def memory_bytes(self) -> tuple[int, int]:
        """Bytes that are free, and in all."""

    def allocate(self, bytes: int, is_exportable: bool = False) -> DeviceMemory:
        """Device memory. Raises CapacityError when there is not that much."""

    def pin(self, address: int, bytes: int) -> PinnedRange:
        """
        Start registering host memory, which begins at a multiple of 4096, in the background.
        """

    def mark(self, stream: int) -> StreamMark:
        """
        A point behind what is in a stream (a CUstream) now. Raises UsageError for the null stream.
        """

    def make_gate(self) -> Gate:
        """A counter at 0 that streams can wait for."""

    def check_address(self, address: int) -> int:
        """
        Bytes there are from a device address on. Raises UsageError where it is not memory of this device.
        """

    def health(self) -> str:
        """
        Empty, or the error that ended the device for this process or lost part of it.
        """

    def create_stream(self) -> int:
        """A stream of its own, as a CUstream; for tests and benchmarks."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream; what is in it still runs."""

    def stream_synchronize(self, stream: int) -> None:
        """Wait without the GIL, and without a bound, until a stream is idle."""

    def fill(self, address: int, value: int, bytes: int, stream: int) -> None:
        """Set device memory to a value, in stream order."""

    def share(self, memory: DeviceMemory) -> tuple[bytes, int, int]:
        """
        What another process needs to map memory of this device: (bytes, fd, size_bytes). The descriptor, -1 for memory that is not exportable, is the caller's to send and close.
        """

    def share_at(self, address: int, bytes: int) -> tuple[bytes, int, int, int]:
        """
        As `share`, for memory of this device whoever allocated it: (bytes, fd, size_bytes, offset) of the allocation it lies in, and where. Raises UnavailableError when its allocator made it so that it cannot be shared.
        """

    def can_reach(self, ordinal: int) -> str:
        """
        Empty when copies of this device reach memory of another one directly, else why not.
        """

    def note_host_access(self, address: int, blocks: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], is_write: bool) -> None:
        """
        Announce that the CPU reads or writes blocks, (n, 4) int64 rows, that copies use. Nothing on a real driver; the simulated one finds races with it.
        """

    def open_shared(self, bytes: bytes, fd: int, size_bytes: int) -> DeviceMemory:
        """
        Map what another process shared. The sender must keep it meanwhile. `fd` stays the caller's.
        """

    def enable_peer(self, peer: Device) -> None:
        """Let both devices reach each other's memory. Raises UnavailableError."""

def open_cuda_device(library: str = 'libcuda.so.1', ordinal: int = 0) -> Device:
    """A GPU by its number. Raises UnavailableError with what is missing."""

def open_emulated_device(total_bytes: int) -> Device:
    """Host memory that plays a device: copies are memory copies on threads."""

def list_cuda_devices(library: str = "libcuda.so.1") -> list[dict[str, object]]:
    """
    `Device.info` of every GPU, without using any. Raises UnavailableError.
    """

class Copies:
    """
    Copies to, from and within a device, in streams of their own. Memory they name must live until they have completed.
    """

    def __init__(self, device: Device, *, sm: str = 'auto', ctas: int = 4, staging_bytes: int = 67108864, calibration: Annotated[NDArray[numpy.float64], dict(shape=(3, 4, 11), order='C', device='cpu', writable=False)] | None = None, plain: Annotated[NDArray[numpy.float64], dict(shape=(3), order='C', device='cpu', writable=False)] | None = None) -> None:
        """
        Start the threads. `sm`: "auto" lets small fragments go by a kernel of `ctas` CTAs and `staging_bytes` of device memory a direction, "never" launches none. `calibration` and `plain` as in `plan_copies`.
        """

    def __enter__(self) -> Copies:
        """Nothing but the copies."""

    def __exit__(self, *exception: object) -> None:
        """Close with a bound of a second."""

    def submit(self, direction: str, targets: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], sources: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], bytes: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], after: StreamMark | None = None) -> int:
        """
        Copy (n,) uint64 runs in `direction` ("h2d", "d2h", "d2d"), not before `after`. Returns a ticket at once. Submissions are in no order to each other.
        """

    def wait(self, ticket: int, timeout_s: float) -> int:
        """
        Wait without the GIL for a ticket, once: its kvx::Code, 0 when the bytes are there; 8 when time is up, and the ticket stays good. Raises UsageError for any other ticket.
        """

    def submit_blocks(self, direction: str, target_base: int, targets: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], source_base: int, sources: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], after: StreamMark | None = None) -> int:
        """
        As `submit`, for blocks on both sides: (n, 4) int64 rows of offset, stride, count and bytes from each base on, which were checked. Raises UsageError when the totals of a block differ.
        """

    def wait_any(self, timeout_s: float) -> list[tuple[int, int, int]]:
        """
        Wait without the GIL until copies have completed, and take them: (ticket, kvx::Code, CUresult) each. Empty when time is up or after `wake`. For one reader, beside whom nobody calls `wait`.
        """

    def wake(self) -> None:
        """Make one `wait_any` return."""

    def cancel(self, ticket: int) -> None:
        """Ask that a copy be given up; its ticket tells (9) whether it was."""

    def stats(self) -> dict[str, int]:
        """
        Bytes and requests by direction, runs and driver calls by method, and more.
        """

    def close(self, timeout_s: float) -> int:
        """
        Cancel what has not begun and wait for the rest. Returns how many copies had to be abandoned: their memory must never be freed. Later calls return the same.
        """

def find_overlap(blocks: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)]) -> int:
    """
    The number of a block, of (n, 4) int64 checked rows, that has bytes in common with another one; -1 when none has.
    """

class Kernels:
    """
    kvx's kernels on one GPU. A launch is ordered on its stream, a CUstream but not the null one, and returns before it has run; memory must live until then. Thread-safe.
    """

    def __init__(self, device: Device) -> None:
        """Load them, which may take a compiler seconds. Raises UnavailableError."""

    @property
    def origin(self) -> str:
        """"fatbin" or "nvrtc"."""

    @property
    def launches(self) -> int:
        """Kernels launched so far on this device."""

    def copy_fragments(self, stream: int, fragments_address: int, count: int, fragment_bytes_max: int, ctas: int = 4) -> None:
        """
        Copy `count` fragments, whose table of uint64 (target, source, bytes) lies at an address of the device or in pinned memory.
        """

    def permute(self, stream: int, target: int, source: int, *, sizes: Sequence[int], target_strides: Sequence[int], source_strides: Sequence[int], run_bytes: int, target_ids: int = 0, source_ids: int = 0, ctas: int = 4) -> None:
        """
        Copy between two arrays of up to 5 axes over runs of `run_bytes`, strides in bytes. `target_ids` and `source_ids`: addresses of int64 places along the first axis, or 0.
        """

    def reshard(self, stream: int, whole: int, parts: Sequence[int], *, whole_block_stride: int, part_block_stride: int, blocks: int, rows: int, run_bytes: int, is_merge: bool, ctas: int = 4) -> None:
        """
        Split blocks of (rows, parts, run) into parts of (rows, run) each, or merge them. At most 16 parts.
        """

    def poison(self, stream: int, target: int, bytes: int, ctas: int = 4) -> None:
        """Fill device memory with 0xFF."""

    def quantise_fp8(self, stream: int, wide: int, narrow: int, scales: int, partials: int, *, shape: Sequence[int], wide_strides: Sequence[int], narrow_strides: Sequence[int], kind: str, ctas: int = 4) -> None:
        """
        Write e4m3fn `narrow` and (blocks, heads) float32 `scales` of `wide`; `shape` is (blocks, tokens, heads, dim), strides those of its first three axes, in bytes, `kind` "float16", "bfloat16" or "float32". `partials` is scratch.
        """

    def dequantise_fp8(self, stream: int, wide: int, narrow: int, scales: int, *, shape: Sequence[int], wide_strides: Sequence[int], narrow_strides: Sequence[int], kind: str, ctas: int = 4) -> None:
        """
        Write `wide` from `narrow` and `scales`; the rest as in `quantise_fp8`.
        """

    @staticmethod
    def partials_bytes(blocks: int, heads: int) -> int:
        """Bytes of scratch that quantising needs."""

class Job:
    """
    The shared handle of one batch. *Terminal*: its results are final. *Quiesced*: nothing touches its memory any more; before that it may be neither reused nor freed, but for its planes, which are *at rest* once it is terminal and no copy from or to them is running. Thread-safe, and usable after its engine was closed.
    """

    @property
    def id(self) -> int:
        """Number of the job, unique in its engine; ints from 1."""

    @property
    def kind(self) -> str:
        """"copy_in", "copy_out", "verify", "read" or "write"."""

    def state(self) -> str:
        """
        "running", "done" (every block ok), "failed", "timed_out" or "cancelled".
        """

    def is_terminal(self) -> bool:
        """Whether the results are final."""

    def is_at_rest(self) -> bool:
        """Whether nothing touches the planes any more."""

    def is_quiesced(self) -> bool:
        """Whether nothing touches the memory any more."""

    def wait(self, timeout_s: float) -> bool:
        """
        Wait without the GIL, doing some of the job's copying meanwhile. True once terminal.
        """

    def wait_at_rest(self, timeout_s: float) -> bool:
        """Wait without the GIL. True once at rest."""

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait without the GIL. True once quiesced."""

    def cancel(self) -> bool:
        """
        End the job and ask that its I/O be given up. True when this call ended it, False when it had already ended. Never blocks.
        """

    def codes(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """Outcome of every block as (n,) int32 of kvx::Code, -1 while undecided."""

    def errnos(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """Errno behind every block's storage error as (n,) int32, else 0."""

    def checksums(self) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
        """
        Checksum computed of every block as (n,) uint64; 0 where no bytes were seen.
        """

    def raise_if_sync_failed(self) -> None:
        """
        Raise StorageError with the errno of the first failed sync of a write job.
        """

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""

    @property
    def blocks_done(self) -> int:
        """Blocks that are ok so far."""

    @property
    def bytes_done(self) -> int:
        """Bytes of the blocks that are ok so far."""

    @property
    def latency_ns(self) -> int:
        """From submission to the end, or to now."""

    @property
    def elapsed_s(self) -> float:
        """`latency_ns` in seconds."""

class Engine:
    """
    Streams batches of blocks between planes, host slots and files on native threads. Deadlines are seconds from submission. Thread-safe; a context of close(1.0) if used in `with`.
    """

    def __init__(self, copy_threads: int = 0, backend: str = 'auto', queue_depth: int = 64, io_threads: int = 4, failpoints: Failpoints | None = None, journal_path: str = '') -> None:
        """
        Start threads: `copy_threads` (0: one a CPU), a reactor, and those of the backend ("auto", "io_uring", "posix"). Raises UsageError, UnavailableError.
        """

    def __enter__(self) -> Engine:
        """Nothing but the engine."""

    def __exit__(self, *exception: object) -> None:
        """Close with a bound of a second."""

    @property
    def backend_name(self) -> str:
        """The backend in use, decorators included."""

    @property
    def backend_reason(self) -> str:
        """Why io_uring is not in use; empty when it is, or was not asked for."""

    def open_file(self, path: str, *, create: bool = False, direct: bool = True) -> tuple[int, bool]:
        """
        Open for reading and writing, mode 0600: (fd, is_direct). Raises StorageError.
        """

    def close_file(self, fd: int) -> None:
        """Close a descriptor. Raises StorageError."""

    def preallocate(self, fd: int, offset: int, bytes: int) -> None:
        """
        Reserve a range so that writes cannot meet ENOSPC. Raises StorageError.
        """

    def register_buffer(self, address: int, bytes: int) -> str:
        """Pin a buffer for faster I/O; empty, or why not (which is no error)."""

    def unregister_buffer(self, address: int) -> None:
        """Undo `register_buffer`. No I/O inside it may be in flight."""

    def next_completions(self, max: int, timeout_s: float) -> tuple[NDArray[numpy.int64], NDArray[numpy.uint8]]:
        """
        Wait without the GIL for notifications: (ids (k,) int64, flags (k,) uint8), 1 terminal, 2 quiesced, 3 both. Empty when time is up or the engine is closed.
        """

    def wake(self) -> None:
        """
        Make one `next_completions` return now, with a notification of job 0, which is none.
        """

    def fileno(self) -> int:
        """
        An eventfd that is readable while notifications wait. Belongs to the engine.
        """

    def quarantined_jobs(self) -> int:
        """Jobs that have ended while their memory is still in use."""

    def quarantined_bytes(self) -> int:
        """Bytes of the jobs in quarantine."""

    def stats(self) -> dict[str, object]:
        """Counters by kind of job and by state, queue lengths, late I/O."""

    def close(self, timeout_s: float) -> dict[str, int]:
        """
        Refuse new jobs, let running ones end for half the time, cancel the rest, and wait for their memory. Returns cancelled_jobs, abandoned_jobs and abandoned_bytes; abandoned memory must never be freed. Later calls return the same.
        """

    def copy_in(self, planes: Annotated[NDArray[numpy.int64], dict(shape=(None, 3), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], deadline_s: float, is_on_device: bool = False, after: StreamMark | None = None) -> Job:
        """
        Gather blocks `ids` (n,) int64 of planes (p, 3) int64 {base, stride, bytes} into host slots at `addresses` (n,) int64; checksums are computed under `keys` (n, 16) uint8. The memory must stay until the job is quiesced. With `is_on_device` the planes are memory of the attached device, whose copies begin after the mark. Raises UsageError.
        """

    def copy_out(self, addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.int64], dict(shape=(None, 3), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], deadline_s: float, is_on_device: bool = False, after: StreamMark | None = None, progress: LayerProgress | None = None, layer_planes: int = 0) -> Job:
        """
        Scatter host slots to planes. A block that does not match `checksums` (n,) uint64 is corrupt and its target filled with 0xFF; on the device it keeps what it held. With `layer_planes` the device gets that many planes of all blocks at a time, and `progress` is told. Raises UsageError.
        """

    def verify(self, addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], block_bytes: int, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], deadline_s: float) -> Job:
        """Check host slots against `checksums` (n,) uint64. Raises UsageError."""

    def read(self, fds: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], offsets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], block_bytes: int, io_bytes: int, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.int64], dict(shape=(None, 3), order='C', device='cpu', writable=False)] | None, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, deadline_s: float, is_on_device: bool = False, after: StreamMark | None = None, progress: LayerProgress | None = None, layer_planes: int = 0) -> Job:
        """
        Read `io_bytes` (>= block_bytes; a multiple of 4096 for direct files) at each (fd int32, offset int64) into the slot at its address, verify, and with planes scatter in the same pass, each block as soon as it arrived. Raises UsageError.
        """

    def write(self, fds: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], offsets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], bytes: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], sync_fds: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], deadline_s: float) -> Job:
        """
        Write `bytes` (n,) int64 of each address to (fd, offset); after all of them, fdatasync each of `sync_fds` (m,) int32. A block of a synced file is ok once the sync is. Raises UsageError.
        """

    def attach_device(self, device: Device, *, sm: str = 'auto', ctas: int = 4, staging_bytes: int = 0, calibration: Annotated[NDArray[numpy.float64], dict(shape=(3, 4, 11), order='C', device='cpu', writable=False)] | None = None, plain: Annotated[NDArray[numpy.float64], dict(shape=(3), order='C', device='cpu', writable=False)] | None = None) -> None:
        """
        Give the engine the device that jobs with device memory run on; once, before the first of them. Options as for `Copies`. Raises UsageError, CapacityError, UnavailableError.
        """

    def copy_stats(self) -> dict[str, int]:
        """What the device has copied, as `Copies.stats`; zeros without one."""

    def fetch(self, device_addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], block_bytes: int, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)], checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.int64], dict(shape=(None, 3), order='C', device='cpu', writable=False)] | None, ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, deadline_s: float) -> Job:
        """
        Copy device slots at `device_addresses` (n,) int64 into host slots, verify, and with planes scatter to host memory in the same pass. Raises UsageError.
        """

    def device_in(self, planes: Annotated[NDArray[numpy.int64], dict(shape=(None, 3), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], device_addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], deadline_s: float, after: StreamMark | None = None) -> Job:
        """
        Gather blocks of device planes into device slots. Nothing is checksummed. Raises UsageError.
        """

    def device_out(self, device_addresses: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], planes: Annotated[NDArray[numpy.int64], dict(shape=(None, 3), order='C', device='cpu', writable=False)], ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], deadline_s: float, after: StreamMark | None = None, progress: LayerProgress | None = None) -> Job:
        """Scatter device slots to device planes. Raises UsageError."""

class TlsContext:
    """Certificates and keys of agents' connections."""

    def __init__(self, certificate: str, private_key: str, authority: str) -> None:
        """Files in PEM. UnavailableError: there is no libssl here."""

class RemoteJob:
    """
    The shared handle of one transfer with a peer. *Terminal*: its results are final. *Quiesced*: nothing of ours touches its local memory, and the receiver of a write is known to have stopped. Thread-safe.
    """

    @property
    def id(self) -> int:
        """Number of the transfer, unique in its agent."""

    def state(self) -> str:
        """
        "running", "done" (every block ok), "failed", "timed_out" or "cancelled".
        """

    def is_terminal(self) -> bool:
        """Whether the results are final."""

    def is_quiesced(self) -> bool:
        """Whether its bytes have stopped."""

    def is_lost(self) -> bool:
        """Whether it failed because the peer is gone."""

    def wait(self, timeout_s: float) -> bool:
        """
        Wait without the GIL, receiving or copying meanwhile. True once terminal.
        """

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait without the GIL. True once quiesced."""

    def cancel(self) -> bool:
        """
        Ask to stop. False when it had ended. A read ends now, a write when the peer says how far it came, or soon after.
        """

    def watch(self) -> bool:
        """
        Ask for an event when it ends; True when it has ended, and none will come.
        """

    def codes(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """Outcome of every block as (n,) int32 of kvx::Code, -1 while undecided."""

    def errnos(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """Errno behind every block's failure as (n,) int32, else 0."""

    def checksums(self) -> Annotated[NDArray[numpy.uint64], dict(shape=(None,))]:
        """Checksum computed of every block that arrived as (n,) uint64, else 0."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""

    @property
    def blocks_done(self) -> int:
        """Blocks that are ok so far."""

    @property
    def bytes_done(self) -> int:
        """Bytes of the blocks that are ok so far."""

    @property
    def latency_ns(self) -> int:
        """From submission to the end, or to now."""

class LinkAgent:
    """
    The endpoint of this process: registered memory, leases, connections and transfers. Thread-safe; close it, with a bound.
    """

    def __init__(self, *, io_threads: int = 1, copy_threads: int = 0, greeting_s: float = 5.0, greetings_max: int = 64, ping_s: float = 1.0, piece_bytes: int = 1048576, cancel_grace_s: float = 0.1) -> None:
        """See AgentOptions in agent.h."""

    def listen_tcp(self, host: str, port: int, tls: TlsContext | None = None) -> int:
        """Accept connections; port 0 takes a free one. Returns the port."""

    def listen_unix(self, path: str) -> None:
        """Accept connections of this host; the socket file is made 0600."""

    def dial_tcp(self, host: str, port: int, tls: TlsContext | None, timeout_s: float) -> int:
        """Begin to connect; an event tells how it went. Returns the connection."""

    def dial_unix(self, path: str, timeout_s: float) -> int:
        """Begin to connect; an event tells how it went. Returns the connection."""

    @staticmethod
    def pair(one: LinkAgent, other: LinkAgent) -> tuple[int, int]:
        """Connect two agents of this process. Returns both ends."""

    def approve(self, connection: int, peer: int) -> None:
        """
        Let a greeted connection carry everything, on behalf of `peer` (not 0).
        """

    def drop(self, connection: int, reason: str) -> None:
        """End a connection and what runs over it."""

    def send_greeting(self, connection: int, payload: bytes) -> None:
        """Send before the connection is approved."""

    def send_message(self, connection: int, payload: bytes) -> None:
        """Send a control message."""

    def send_note(self, connection: int, payload: bytes) -> None:
        """Send a notification."""

    def next_events(self, max: int, timeout_s: float) -> list[tuple[int, int, int, int, bytes]]:
        """
        Wait without the GIL for (kind, connection, peer, id, payload); see agent.h. One thread reads them.
        """

    def wake(self) -> None:
        """Make one `next_events` return at once."""

    def close(self, timeout_s: float) -> tuple[int, int, int]:
        """
        Refuse what is new, give transfers half of the time to end, and cancel the others. Returns (cancelled jobs, abandoned jobs, abandoned bytes).
        """

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""

    def add_region(self, address: int, bytes: int, fd: int = -1, fd_offset: int = 0) -> int:
        """
        Let transfers touch memory. `fd`: the memfd it is mapped from, which is sealed: peers map it, and only this process ever writes it. Returns the region.
        """

    def remove_region(self, region: int, timeout_s: float) -> bool:
        """
        Refuse new uses and wait for the others. False: still in use; call again.
        """

    def grant(self, region: int, blocks: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], *, rights: int, peer: int, ttl_s: float, checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)] | None = None) -> tuple[int, int, int]:
        """
        Lease blocks, (n, 4) int64 rows of offset, stride, count and bytes, to a peer (0: any) for reading (1), writing (2) or both (3). Returns (id, slot, generation).
        """

    def revoke(self, lease: int, timeout_s: float) -> bool:
        """
        End a lease and wait for what is under way. False: that goes on; call again.
        """

    def renew(self, lease: int, ttl_s: float) -> None:
        """Let a lease last until `ttl_s` from now."""

    def can_pull(self, peer: int, region: int, timeout_s: float = 0.0) -> str:
        """
        Empty when the peer's region can be copied on this host, else why not. Waits that long for the peer to announce it.
        """

    def add_opaque_region(self, bytes: int) -> int:
        """
        Let memory be leased that only a backend of its own can touch. Returns the region, numbered from 1 << 31 on.
        """

    def use_lease(self, lease: tuple[int, int, int], peer: int, rights: int) -> LeaseUse:
        """
        Begin work of `peer` under a lease (id, slot, generation) of this agent that needs these rights. Raises StaleReference when it has ended, UsageError when it is not for that.
        """

    def sight(self, peer: int) -> PeerSight:
        """
        A sight of a peer on this host. Raises UnavailableError when it is not connected over a unix socket.
        """

    def info(self, connection: int) -> dict[str, object]:
        """
        What is known of a connection, by the names of ConnectionInfo in agent.h.
        """

    def stats(self) -> dict[str, int]:
        """Counters and gauges, by the names of AgentStats in agent.h."""

    def quarantine(self) -> list[tuple[int, int, bool, int, float]]:
        """
        Transfers that ended while their bytes may still move: (id, peer, is_write, bytes, seconds since).
        """

    def submit(self, *, is_write: bool, way: int, peer: int, lease: tuple[int, int, int], plan: RemotePlan, deadline_s: float, note: bytes) -> RemoteJob:
        """
        Start a transfer over blocks of a `lease` (id, slot, generation) of `peer`. `way`: 0 through the connections, 1 copied on this host. `note` is delivered to the peer once all bytes have arrived. Never blocks on the work.
        """

class LeaseUse:
    """
    Work of a peer under a live lease of this agent; until `end`, or the last reference, revoking the lease waits.
    """

    @property
    def region(self) -> int:
        """Number of the leased region."""

    @property
    def blocks(self) -> Annotated[NDArray[numpy.int64], dict(shape=(None, None))]:
        """
        The leased blocks, (n, 4) int64 rows of offset, stride, count and bytes.
        """

    @property
    def is_range(self) -> bool:
        """Whether it is one run of bytes, of which any part may be named."""

    def is_live(self) -> bool:
        """Whether the lease has neither been revoked nor expired."""

    def end(self) -> None:
        """Say that the peer is through, or gone."""

class PeerSight:
    """What can be seen of a peer on this host, also after it is gone."""

    def look(self, slot: int, generation: int) -> int:
        """
        kvx::Code: 0, 7 when that lease of the peer has ended, 12 when its process has.
        """

class RemotePlan:
    """
    What both sides of a transfer are: checked once, used any number of times.
    """

    def __init__(self, agent: LinkAgent, region: int, local: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], remote_region: int, remote: Annotated[NDArray[numpy.int64], dict(shape=(None, 4), order='C', device='cpu', writable=False)], indices: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, checksums: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, keys: Annotated[NDArray[numpy.uint8], dict(shape=(None, 16), order='C', device='cpu', writable=False)] | None = None) -> None:
        """
        Blocks are (n, 4) int64 rows of offset, stride, count and bytes, of `region` of this agent and `remote_region` of the peer. `indices` (n,) uint32 names them in the lease; None: they lie within a lease of a range. `checksums` (n,) uint64 are expected, under `keys` (n, 16) uint8.
        """

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
