// Which block is in which slot of one pool of one tier, which may go, and in what order.
//
// A BlockIndex is a slot table, a hash map from key to slot and an eviction order in one, for slots
// of equal size that the caller owns; it never touches their bytes. Slots come and go in runs
// (add_slots, retire_slots). A block is written in two steps: reserve() gives a slot, evicting if
// need be, the caller fills it, commit() makes it visible. Readers match() or lookup() keys.
//
// Life of a slot:
//     free -reserve-> reserved -commit-> committed -evict, remove, expire-> free
//     reserved -abort-> free; reserved -remove-> cancelled -commit (fails) or abort-> free
//     committed and pinned -remove, expire-> doomed -last unpin-> free
// A key is visible from commit() until its block is evicted, removed or past its expiry; a doomed
// block is invisible at once, its bytes stay until the last pin goes. A slot that is being written
// (reserved, cancelled) is never given to anybody else.
//
// References. {slot, generation, key} names one life of one slot: the generation is bumped when a
// block leaves a slot and again when the slot is reserved. A reader either pins what it reads, or
// copies the bytes and calls validate() before and after, dropping the copy when the second says
// no. The index promises that the generation has changed before anybody is told to write the slot.
// Every call that takes references ignores stale ones and says which; none harms a block that took
// the slot since. For a doomed block validate() is still true: its holders may finish reading.
//
// Eviction skips blocks that are pinned, reserved or dirty. Such a block leaves the order when its
// turn comes; once nothing holds it, it returns as the next to go, or as the most recent one if it
// was touched meanwhile. An owner at its limit evicts its own blocks; else the policy chooses.
//
// Order in a batch: earlier keys end up more recent than later ones, on commit, insert and touch,
// so the head of a prefix outlives its tail.
//
// Time is an argument (`now_ms`, any clock that starts near 0 or at the Unix epoch). Expiry has a
// resolution of one second and is never early. Pins and leases do not depend on it until expire().
//
// Thread-safe: one lock, taken once a batch. All spans of one call have equal sizes (REQUIRES).
// Memory: 56 bytes a slot, 6.4 for the hash map, 1.5 more with kS3Fifo; history apart.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvx/block_key.h"
#include "kvx/eviction_policy.h"
#include "kvx/miss_history.h"
#include "kvx/status.h"

namespace kvx {

inline constexpr int64_t kSlotsMax = (int64_t{1} << 28) - 1;
inline constexpr int64_t kPinsMax = 65535;

enum class ReserveOutcome : uint8_t {
  kReserved = 0,  // the slot is the caller's until commit() or abort()
  kExists = 1,    // committed already; the slot and generation are those of the block
  kInFlight = 2,  // somebody else (or an earlier row of this batch) is writing it
  kNoSpace = 3,   // every slot is pinned, dirty or reserved
  kQuota = 4,     // the owner is at its limit and none of its blocks may go
};

// What an index knows of a key; for explaining misses, not for reading.
enum class KeyCondition : uint8_t {
  kAbsent = 0,
  kHeld = 1,
  kExpired = 2,  // here still, but past its expiry
  kWriting = 3,  // reserved, not committed
};

// Blocks that left, for events: parallel arrays in the order they left.
struct Removed {
  std::vector<BlockKey> keys;
  std::vector<int64_t> slots;
  std::vector<int32_t> owners;
};

// Out: where blocks are. A row that is absent has slot -1, generation 0, checksum 0.
struct Places {
  std::span<int64_t> slots;
  std::span<uint32_t> generations;
  std::span<uint64_t> checksums;
};

// In: references to blocks. Out-of-range values are stale, not errors.
struct References {
  std::span<const int64_t> slots;
  std::span<const uint32_t> generations;
};

struct WriteOptions {
  int32_t owner = 0;      // any number; owners are made on first use and never forgotten
  bool is_dirty = false;  // must be flushed (take_dirty, mark_clean) before it may be evicted
  uint32_t ttl_s = 0;     // 0: never expires
  uint64_t now_ms = 0;
};

struct ReadOptions {
  uint64_t now_ms = 0;
  bool is_touch = false;  // counts as a use for the policy
  bool is_pin = false;    // the caller owes an unpin() of every block found
};

// One array per attribute of a block; see snapshot().
struct IndexSnapshot {
  std::vector<BlockKey> keys;
  std::vector<int64_t> slots;
  std::vector<uint32_t> generations;
  std::vector<uint64_t> checksums;
  std::vector<uint8_t> frequencies;
  std::vector<uint64_t> ticks;  // of the last move to a hot end: larger is more recent
  std::vector<int64_t> expiry_s;
  std::vector<int32_t> owners;
  std::vector<int32_t> pins;
  std::vector<uint8_t> is_dirty;
};

struct RestoredBlocks {
  std::span<const BlockKey> keys;
  References places;
  std::span<const uint64_t> checksums;
  std::span<const uint8_t> frequencies;
  std::span<const int64_t> expiry_s;
  std::span<const int32_t> owners;
};

struct IndexStats {
  int64_t slots_total = 0;
  int64_t slots_free = 0;
  int64_t committed = 0;
  int64_t reserved = 0;  // being written, cancelled ones too
  int64_t doomed = 0;
  int64_t pinned = 0;
  int64_t dirty = 0;
  int64_t expiring = 0;  // committed with an expiry
  int64_t leases = 0;
  int64_t owners = 0;
  int64_t inserted = 0;  // the rest are counters since the start
  int64_t hits = 0;      // keys asked for with match() and lookup()
  int64_t misses = 0;
  int64_t evicted = 0;
  int64_t expired = 0;
  int64_t removed = 0;
  int64_t aborted = 0;
  int64_t leases_expired = 0;
  int64_t memory_bytes = 0;          // all but the history
  int64_t history_memory_bytes = 0;  // shared with other indexes
};

class BlockIndex {
 public:
  // `history` may be null; the index writes why blocks left into it.
  BlockIndex(EvictionPolicy policy, std::shared_ptr<MissHistory> history);
  ~BlockIndex();
  BlockIndex(const BlockIndex&) = delete;
  BlockIndex& operator=(const BlockIndex&) = delete;

  // --- slots ---
  // Memory is taken for every slot number from 0 to the largest, so number slots densely. kUsage
  // when one is there already or beyond kSlotsMax; kCapacity without memory; then nothing changed.
  Status add_slots(int64_t first, int64_t count);
  // Removes the blocks in the run and takes the slots away. False, and nothing done, when one of
  // them is pinned or being written. kUsage when one is not in the pool.
  Status retire_slots(int64_t first, int64_t count, bool* is_retired, Removed* removed);

  // --- writing ---
  // kUsage when there are too many owners (65535); then nothing was done. Rows are taken one after
  // the other: a later row may evict the block of a kExists row, so touch such blocks first.
  Status reserve(std::span<const BlockKey> keys, const WriteOptions& options,
                 std::span<uint8_t> outcomes, std::span<int64_t> slots,
                 std::span<uint32_t> generations, Removed* evicted);
  // is_done[i] = 1 where the reservation still stood. A 0 after remove() freed the slot.
  void commit(References reserved, std::span<const uint64_t> checksums, std::span<uint8_t> is_done);
  void abort(References reserved, std::span<uint8_t> is_done);
  // reserve() and commit() in one, for callers whose bytes are in place or who have none.
  // Blocks of the batch do not evict one another.
  Status insert(std::span<const BlockKey> keys, std::span<const uint64_t> checksums,
                const WriteOptions& options, std::span<uint8_t> outcomes, std::span<int64_t> slots,
                std::span<uint32_t> generations, Removed* evicted);

  // --- reading ---
  // The length of the longest prefix of `keys` that is here; rows beyond it are not written.
  // kUsage, and nothing pinned, when a block has kPinsMax pins already.
  Status match(std::span<const BlockKey> keys, const ReadOptions& options, Places places,
               int64_t* count);
  Status lookup(std::span<const BlockKey> keys, const ReadOptions& options,
                std::span<uint8_t> is_found, Places places);
  // counts[j] = how long a prefix of the j-th request is here; request j is the next lengths[j]
  // keys. No touch, no pin, no hit counters. REQUIRES: the lengths add up to keys.size().
  void match_many(std::span<const BlockKey> keys, std::span<const int64_t> lengths, uint64_t now_ms,
                  std::span<int64_t> counts);
  void validate(std::span<const BlockKey> keys, References references, std::span<uint8_t> is_live);
  // conditions[i] = the KeyCondition of keys[i]. No touch, no pin, no hit counters.
  void inspect(std::span<const BlockKey> keys, uint64_t now_ms, std::span<uint8_t> conditions);

  // --- holding ---
  // Rows that are stale, or would exceed kPinsMax, are left alone and say 0.
  void pin(References references, std::span<uint8_t> is_done);
  void unpin(References references, std::span<uint8_t> is_done);
  // Pins all of them until `expires_ms` (0: until released), or none: kStale, or kUsage beyond
  // kPinsMax.
  Status lease(References references, uint64_t expires_ms, int64_t* lease_id);
  // False when it expired or was released before.
  bool release(int64_t lease_id);
  bool lease_is_live(int64_t lease_id, uint64_t now_ms);
  // Drops the pins of all expired leases, then looks at up to `slots_max` slots (from where the
  // last call stopped, around) and removes blocks past their expiry.
  Removed expire(uint64_t now_ms, int64_t slots_max);

  // --- removing and flushing ---
  Removed remove(std::span<const BlockKey> keys, RemovalReason reason);
  Removed clear();
  void mark_clean(References references, std::span<uint8_t> is_done);
  // The up to keys.size() coldest dirty blocks that nobody flushes yet, pinned; how many. The
  // caller writes them, then mark_clean() if that went well, then unpin() in any case.
  int64_t take_dirty(std::span<BlockKey> keys, Places places);

  // --- owners ---
  // -1: no limit. Evicts down to the limit as far as blocks may go. kUsage: too many owners.
  Status set_owner_limit(int32_t owner, int64_t slots_max, Removed* evicted);
  int64_t owner_used(int32_t owner);

  // --- recovery ---
  // Commits blocks whose bytes are in given slots already, coldest first. 0 where the slot is not
  // free, the key is here or the owner at its limit. kUsage: too many owners.
  Status restore(const RestoredBlocks& blocks, std::span<uint8_t> is_done);
  // All committed blocks, coldest first (by level, then by last move to a hot end).
  IndexSnapshot snapshot();

  // --- looking after it ---
  IndexStats stats();
  // kCorrupt naming the first violated invariant. O(slots).
  Status check_integrity();
  const std::shared_ptr<MissHistory>& history() const;

 private:
  class Core;
  class Call;
  std::unique_ptr<Core> core_;
};

}  // namespace kvx
