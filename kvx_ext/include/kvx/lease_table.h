// Leases: what a peer may read or write, until when, and how everybody sees that it has ended.
//
// A lease names blocks of one region. Its generation stands in a shared page that peers on the same
// host map: they look at it before and after they copy, so a block that was reused meanwhile is
// never taken for the one that was leased. Revoking takes effect at once for whoever begins, and
// waits for our own threads that are at work under it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kvx/descriptor.h"
#include "kvx/exposed_region.h"
#include "kvx/status.h"

namespace kvx {

inline constexpr uint32_t kLeaseSlots = 1U << 16;
inline constexpr uint64_t kAnyPeer = 0;

inline constexpr uint8_t kMayRead = 1;
inline constexpr uint8_t kMayWrite = 2;
// Through something that the owner cannot stop, such as a network card; see docs/guides/nixl.md.
inline constexpr uint8_t kMayWriteRemotely = 4;

// One entry of the shared page. Generation 0: no lease.
struct LeaseWord {
  std::atomic<uint64_t> generation;
  std::atomic<int64_t> expires_ns;  // CLOCK_MONOTONIC of this host
};
static_assert(sizeof(LeaseWord) == 16);

// What identifies a lease to its owner, and to readers of the page.
struct LeaseRef {
  uint64_t id = 0;
  uint32_t slot = 0;
  uint64_t generation = 0;
};

struct LeaseTerms {
  uint8_t rights = kMayRead;
  uint64_t peer = kAnyPeer;
  double ttl_s = 30.0;
  std::vector<Descriptor> blocks;
  std::vector<uint64_t> checksums;  // one a block, or none: computed when a block is sent
  std::vector<uint8_t> keys;        // kKeyBytes a block, or none: zeros
};

class LeaseTable;

struct Lease {
  LeaseRef ref;
  LeaseTerms terms;
  RegionHold region;
  int64_t expires_ns = 0;  // as granted; what renew() made of it stands in the page

  // One block that covers a range: requests may name any descriptors within it.
  bool is_range() const { return terms.blocks.size() == 1 && terms.blocks[0].count == 1; }
};

// Work under a lease. While it lives, revoke() waits.
class LeaseUse {
 public:
  LeaseUse() = default;
  LeaseUse(LeaseUse&&) noexcept = default;
  LeaseUse& operator=(LeaseUse&&) noexcept;
  ~LeaseUse() { release(); }
  void release();

  explicit operator bool() const { return lease_ != nullptr; }
  const Lease& operator*() const { return *lease_; }
  const Lease* operator->() const { return lease_.get(); }
  // Neither revoked nor expired. Looked at before and after bytes are touched.
  bool is_live() const;

 private:
  friend class LeaseTable;
  LeaseTable* table_ = nullptr;  // outlives every use: the agent closes in that order
  std::shared_ptr<const Lease> lease_;
};

// Thread-safe.
class LeaseTable {
 public:
  // Makes the shared page, sealed against writes by others.
  static Status create(std::unique_ptr<LeaseTable>* table);
  ~LeaseTable();

  // kUsage: no blocks, blocks outside the region, or arrays of other lengths; kCapacity:
  // kLeaseSlots are out.
  Status grant(RegionHold region, LeaseTerms terms, LeaseRef* ref);
  // Begins work for `peer` that needs `rights`. kStale: unknown, revoked, expired or of another
  // generation; kUsage: not this peer's, or not for this.
  Status use(const LeaseRef& ref, uint64_t peer, uint8_t rights, LeaseUse* use);
  // Ends it for whoever begins from now on, and waits until no use is left. kTimeout: it is still
  // in use. Ok when it had ended.
  Status revoke(uint64_t id, double timeout_s);
  // Extends a live lease; kStale when it has ended.
  Status renew(uint64_t id, double ttl_s);
  // Ends all that have expired, and all granted to one peer (not those for kAnyPeer); they are gone
  // once their uses are.
  void sweep();
  void revoke_peer(uint64_t peer);

  bool is_live(const LeaseRef& ref) const;
  int64_t live() const;    // leases
  int64_t in_use() const;  // uses
  int64_t bytes() const;   // leased
  int fd() const { return fd_; }
  // No peer is shown the page any more.
  void close_fd();

 private:
  friend class LeaseUse;
  struct Entry;
  using Entries = std::unordered_map<uint64_t, std::unique_ptr<Entry>>;
  LeaseTable() = default;
  void end_use(const Lease& lease);
  // All REQUIRE mutex_. `ended` takes what is to be destroyed once it is unlocked.
  Status choose_id(uint64_t* id) const;
  void end(Entry& entry);
  Entries::iterator erase(Entries::iterator place, std::vector<std::unique_ptr<Entry>>* ended);
  template <class Selects>
  void end_all(Selects selects, std::vector<std::unique_ptr<Entry>>* ended);

  mutable std::mutex mutex_;
  std::condition_variable idle_;
  Entries leases_;                    // mutex_; ended ones stay until their uses are over
  std::vector<uint32_t> free_slots_;  // mutex_
  uint64_t next_generation_ = 1;      // mutex_
  LeaseWord* words_ = nullptr;
  int fd_ = -1;
};

// The shared page of a peer on the same host, read-only.
class LeaseView {
 public:
  // Takes `fd`, whatever comes of it. kUsage: it is not such a page, or not sealed.
  static Status map(int fd, std::shared_ptr<const LeaseView>* view);
  ~LeaseView();

  bool is_live(uint32_t slot, uint64_t generation) const;

 private:
  LeaseView() = default;
  const LeaseWord* words_ = nullptr;
};

}  // namespace kvx
