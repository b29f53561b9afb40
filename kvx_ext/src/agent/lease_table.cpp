#include "kvx/lease_table.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "agent/lease_word.h"
#include "kvx/checksum.h"

namespace kvx {

static_assert(std::atomic<uint64_t>::is_always_lock_free &&
                  std::atomic<int64_t>::is_always_lock_free,
              "a word in shared memory must be read without a lock");

struct LeaseTable::Entry {
  std::shared_ptr<const Lease> lease;
  int64_t bytes = 0;
  int64_t uses = 0;
  bool is_ended = false;
};

namespace {

Status failed(const char* call) {
  const int error = errno;
  return {error == ENOMEM ? Code::kCapacity : Code::kUnavailable,
          std::string("the page of leases: ") + call + ": " + std::strerror(error), error};
}

int64_t expiry_ns(double ttl_s) {
  return lease_now_ns() + static_cast<int64_t>(std::min(ttl_s, kForeverS) * 1e9);
}

Status check_ttl(double ttl_s) {
  if (ttl_s > 0) return Status::Ok();  // false for NaN
  return {Code::kUsage, "a lease needs ttl_s > 0, not " + std::to_string(ttl_s)};
}

Status check_terms(const RegionHold& region, const LeaseTerms& terms, int64_t* bytes) {
  if (!region) return {Code::kUsage, "the region of the lease is gone"};
  const size_t blocks = terms.blocks.size();
  if (blocks == 0) return {Code::kUsage, "a lease needs blocks"};
  if (Status status = validate(terms.blocks, region->bytes()); !status.ok()) return status;
  if (Status status = check_ttl(terms.ttl_s); !status.ok()) return status;
  if (terms.rights == 0 || (terms.rights & ~(kMayRead | kMayWrite | kMayWriteRemotely)) != 0) {
    return {Code::kUsage, "a lease allows to read (1), to write (2), or both (3)"};
  }
  if (!terms.checksums.empty() && terms.checksums.size() != blocks) {
    return {Code::kUsage, std::to_string(terms.checksums.size()) + " checksums for " +
                              std::to_string(blocks) + " blocks"};
  }
  if (!terms.keys.empty() && terms.keys.size() != blocks * kKeyBytes) {
    return {Code::kUsage, std::to_string(terms.keys.size()) + " bytes of keys for " +
                              std::to_string(blocks) + " blocks of 16"};
  }
  *bytes = 0;
  for (const Descriptor& block : terms.blocks) {
    if (__builtin_add_overflow(*bytes, block.total(), bytes)) {
      return {Code::kUsage, "the lease has more bytes than can be counted"};
    }
  }
  return Status::Ok();
}

}  // namespace

LeaseUse& LeaseUse::operator=(LeaseUse&& other) noexcept {
  if (this != &other) {
    release();
    table_ = other.table_;
    lease_ = std::move(other.lease_);
  }
  return *this;
}

void LeaseUse::release() {
  if (lease_ == nullptr) return;
  table_->end_use(*lease_);
  lease_.reset();
}

bool LeaseUse::is_live() const { return lease_ != nullptr && table_->is_live(lease_->ref); }

Status LeaseTable::create(std::unique_ptr<LeaseTable>* table) {
  std::unique_ptr<LeaseTable> made(new LeaseTable());
  made->fd_ = memfd_create("kvx-leases", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (made->fd_ < 0) return failed("memfd_create");
  if (ftruncate(made->fd_, kLeasePageBytes) != 0) return failed("ftruncate");
  void* mapped = mmap(nullptr, kLeasePageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, made->fd_, 0);
  if (mapped == MAP_FAILED) return failed("mmap");
  // All zero, so no lease is live.
  made->words_ = static_cast<LeaseWord*>(mapped);
  // This mapping stays the only one that can write.
  constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
  if (fcntl(made->fd_, F_ADD_SEALS, kSeals) != 0) return failed("F_ADD_SEALS");
  made->free_slots_.reserve(kLeaseSlots);
  for (uint32_t slot = kLeaseSlots; slot > 0; --slot) made->free_slots_.push_back(slot - 1);
  *table = std::move(made);
  return Status::Ok();
}

LeaseTable::~LeaseTable() {
  if (words_ != nullptr) {
    // Peers keep their mappings of the page; they must see that the leases are over.
    for (const auto& [id, entry] : leases_) end(*entry);
    munmap(words_, kLeasePageBytes);
  }
  close_fd();
}

void LeaseTable::close_fd() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Status LeaseTable::grant(RegionHold region, LeaseTerms terms, LeaseRef* ref) {
  auto entry = std::make_unique<Entry>();
  if (Status status = check_terms(region, terms, &entry->bytes); !status.ok()) return status;
  auto lease = std::make_shared<Lease>();
  lease->expires_ns = expiry_ns(terms.ttl_s);
  lease->terms = std::move(terms);
  lease->region = std::move(region);
  std::vector<std::unique_ptr<Entry>> ended;
  std::lock_guard lock(mutex_);
  if (free_slots_.empty()) {
    const int64_t now_ns = lease_now_ns();
    end_all([&](const Entry& old) { return words_[old.lease->ref.slot].expires_ns <= now_ns; },
            &ended);
  }
  if (free_slots_.empty()) {
    return {Code::kCapacity, "all " + std::to_string(kLeaseSlots) +
                                 " leases are out; revoke some, or lease more blocks at once"};
  }
  if (Status status = choose_id(&lease->ref.id); !status.ok()) return status;
  lease->ref.slot = free_slots_.back();
  free_slots_.pop_back();
  lease->ref.generation = next_generation_++;
  *ref = lease->ref;
  publish_word(words_[ref->slot], ref->generation, lease->expires_ns);
  entry->lease = std::move(lease);
  leases_.emplace(ref->id, std::move(entry));
  return Status::Ok();
}

Status LeaseTable::choose_id(uint64_t* id) const {
  // Random: a peer that was not told a lease cannot guess it.
  do {
    if (getrandom(id, sizeof(*id), 0) != sizeof(*id)) return failed("getrandom");
  } while (*id == 0 || leases_.contains(*id));
  return Status::Ok();
}

Status LeaseTable::use(const LeaseRef& ref, uint64_t peer, uint8_t rights, LeaseUse* use) {
  LeaseUse begun;
  {
    std::lock_guard lock(mutex_);
    const auto found = leases_.find(ref.id);
    if (found == leases_.end()) return {Code::kStale, "the lease has ended, or never was"};
    Entry& entry = *found->second;
    const Lease& lease = *entry.lease;
    if (entry.is_ended || lease.ref.slot != ref.slot || lease.ref.generation != ref.generation ||
        !is_live(lease.ref)) {
      return {Code::kStale, "the lease has ended"};
    }
    if (lease.terms.peer != kAnyPeer && lease.terms.peer != peer) {
      return {Code::kUsage, "the lease was granted to another peer"};
    }
    if (rights == 0 || (lease.terms.rights & rights) != rights) {
      return {Code::kUsage, rights == kMayWrite ? "the lease does not allow to write"
                                                : "the lease does not allow to read"};
    }
    ++entry.uses;
    begun.table_ = this;
    begun.lease_ = entry.lease;
  }
  // Unlocked: what *use held before is given back here.
  *use = std::move(begun);
  return Status::Ok();
}

void LeaseTable::end_use(const Lease& lease) {
  std::vector<std::unique_ptr<Entry>> ended;
  std::lock_guard lock(mutex_);
  const auto found = leases_.find(lease.ref.id);
  Entry& entry = *found->second;
  if (--entry.uses == 0 && entry.is_ended) erase(found, &ended);
}

void LeaseTable::end(Entry& entry) {
  if (entry.is_ended) return;
  clear_word(words_[entry.lease->ref.slot]);
  entry.is_ended = true;
}

LeaseTable::Entries::iterator LeaseTable::erase(Entries::iterator place,
                                                std::vector<std::unique_ptr<Entry>>* ended) {
  free_slots_.push_back(place->second->lease->ref.slot);
  ended->push_back(std::move(place->second));
  idle_.notify_all();
  return leases_.erase(place);
}

template <class Selects>
void LeaseTable::end_all(Selects selects, std::vector<std::unique_ptr<Entry>>* ended) {
  for (auto place = leases_.begin(); place != leases_.end();) {
    Entry& entry = *place->second;
    if (!selects(entry)) {
      ++place;
      continue;
    }
    end(entry);
    place = entry.uses == 0 ? erase(place, ended) : std::next(place);
  }
}

Status LeaseTable::revoke(uint64_t id, double timeout_s) {
  std::vector<std::unique_ptr<Entry>> ended;
  std::unique_lock lock(mutex_);
  const auto found = leases_.find(id);
  if (found == leases_.end()) return Status::Ok();
  end(*found->second);
  if (found->second->uses == 0) {
    erase(found, &ended);
    return Status::Ok();
  }
  if (idle_.wait_until(lock, time_after(timeout_s), [&] { return !leases_.contains(id); })) {
    return Status::Ok();
  }
  return {Code::kTimeout,
          "the lease has ended, but transfers under it are still at work; keep its "
          "memory and try again"};
}

Status LeaseTable::renew(uint64_t id, double ttl_s) {
  if (Status status = check_ttl(ttl_s); !status.ok()) return status;
  std::lock_guard lock(mutex_);
  const auto found = leases_.find(id);
  if (found == leases_.end() || !is_live(found->second->lease->ref)) {
    return {Code::kStale, "the lease has ended; grant a new one"};
  }
  LeaseWord& word = words_[found->second->lease->ref.slot];
  const int64_t old_ns = word.expires_ns.load(std::memory_order_relaxed);
  word.expires_ns.store(std::max(old_ns, expiry_ns(ttl_s)), std::memory_order_release);
  return Status::Ok();
}

void LeaseTable::sweep() {
  const int64_t now_ns = lease_now_ns();
  std::vector<std::unique_ptr<Entry>> ended;
  std::lock_guard lock(mutex_);
  end_all([&](const Entry& entry) { return words_[entry.lease->ref.slot].expires_ns <= now_ns; },
          &ended);
}

void LeaseTable::revoke_peer(uint64_t peer) {
  if (peer == kAnyPeer) return;
  std::vector<std::unique_ptr<Entry>> ended;
  std::lock_guard lock(mutex_);
  end_all([&](const Entry& entry) { return entry.lease->terms.peer == peer; }, &ended);
}

bool LeaseTable::is_live(const LeaseRef& ref) const {
  if (ref.slot >= kLeaseSlots || ref.generation == 0) return false;
  return is_word_live(words_[ref.slot], ref.generation);
}

int64_t LeaseTable::live() const {
  std::lock_guard lock(mutex_);
  return std::count_if(leases_.begin(), leases_.end(),
                       [&](const auto& item) { return is_live(item.second->lease->ref); });
}

int64_t LeaseTable::in_use() const {
  std::lock_guard lock(mutex_);
  int64_t total = 0;
  for (const auto& [id, entry] : leases_) total += entry->uses;
  return total;
}

int64_t LeaseTable::bytes() const {
  std::lock_guard lock(mutex_);
  int64_t total = 0;
  for (const auto& [id, entry] : leases_) {
    if (!is_live(entry->lease->ref)) continue;
    // Leases may overlap, so their sum may be larger than any memory.
    if (__builtin_add_overflow(total, entry->bytes, &total)) {
      return std::numeric_limits<int64_t>::max();
    }
  }
  return total;
}

}  // namespace kvx
