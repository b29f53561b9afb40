// Memory of an agent that its peers may touch, and what peers on this host have announced of
// theirs.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "agent/agent_core.h"
#include "kvx/memory.h"

namespace kvx {

namespace {

constexpr size_t kPeerRegionsMax = 65'536;
constexpr uintptr_t kHugePageBytes = 2 << 20;
// A peer that has the bytes says so at once; one that does not for so long is cut off when somebody
// waits for it.
constexpr double kConfirmS = 0.1;

// On a huge-page boundary, so that huge pages of the owner are mapped as such.
Status map_region(const wire::RegionNews& news, int fd, std::shared_ptr<void>* mapping,
                  uint8_t** mapped) {
  const auto bytes = static_cast<size_t>(news.bytes);
  const auto slack = static_cast<size_t>(kHugePageBytes + kAlignment);
  void* reserved =
      mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) {
    return {Code::kCapacity, std::string("mmap: ") + std::strerror(errno), errno};
  }
  const auto start = reinterpret_cast<uintptr_t>(reserved);
  auto* aligned =
      reinterpret_cast<uint8_t*>((start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes);
  // A region may begin anywhere in its file; a mapping begins on a page.
  const int64_t lead = news.fd_offset % kAlignment;
  void* made = mmap(aligned, bytes + static_cast<size_t>(lead), PROT_READ, MAP_SHARED | MAP_FIXED,
                    fd, news.fd_offset - lead);
  if (made == MAP_FAILED) {
    const int error = errno;
    munmap(reserved, bytes + slack);
    return {Code::kUnavailable, std::string("mapping the peer's region: ") + std::strerror(error),
            error};
  }
  (void)madvise(aligned, bytes, MADV_HUGEPAGE);
  *mapping = std::shared_ptr<void>(reserved, [all = bytes + slack](void* at) { munmap(at, all); });
  *mapped = aligned + lead;
  return Status::Ok();
}

bool is_sealed(int fd, int64_t bytes_needed) {
  const int seals = fcntl(fd, F_GET_SEALS);
  struct stat about;
  return seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && fstat(fd, &about) == 0 &&
         about.st_size >= bytes_needed;
}

bool has_exited(int process_fd) {
  pollfd one{.fd = process_fd, .events = POLLIN, .revents = 0};
  return process_fd >= 0 && poll(&one, 1, 0) > 0;
}

}  // namespace

Status AgentCore::add_peer_region(uint64_t peer, const wire::RegionNews& news, UniqueFd fd) {
  if (news.access == wire::RegionAccess::kPages) {
    std::shared_ptr<const LeaseView> view;
    Status status = LeaseView::map(fd.release(), &view);
    std::lock_guard lock(peers_mutex_);
    const auto found = peers_.find(peer);
    if (status.ok() && found != peers_.end()) found->second.leases = std::move(view);
    region_news_.notify_all();
    return status;
  }
  if (news.bytes <= 0 || news.fd_offset < 0) return {Code::kUsage, "a region without bytes"};
  // One that can shrink would fault under our hands.
  if (fd && !is_sealed(fd.get(), news.fd_offset + news.bytes)) {
    return {Code::kUsage, "a region that its owner could take away"};
  }
  std::lock_guard lock(peers_mutex_);
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return Status::Ok();
  if (found->second.regions.size() >= kPeerRegionsMax) return {Code::kUsage, "too many regions"};
  found->second.newest_region = std::max(found->second.newest_region, news.id);
  found->second.regions.insert_or_assign(news.id, PeerRegion{news, std::move(fd), {}, nullptr});
  region_news_.notify_all();
  return Status::Ok();
}

void AgentCore::drop_peer_region(uint64_t peer, uint32_t region) {
  PeerRegion gone;
  std::lock_guard lock(peers_mutex_);
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return;
  const auto entry = found->second.regions.find(region);
  if (entry == found->second.regions.end()) return;
  gone = std::move(entry->second);
  found->second.regions.erase(entry);
}

Status AgentCore::pull_source(uint64_t peer, uint32_t region, std::span<const Descriptor> blocks,
                              uint32_t slot, uint64_t generation, PullTask* task) {
  std::lock_guard lock(peers_mutex_);
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return {Code::kPeerLost, "there is no connection to the peer"};
  PeerEntry& entry = found->second;
  if (entry.leases == nullptr) {
    return {Code::kUnavailable, "the peer is not connected over a unix socket of this host"};
  }
  const auto known = entry.regions.find(region);
  if (known == entry.regions.end()) {
    return {Code::kStale,
            "the peer has no region " + std::to_string(region) + " any more, or not yet"};
  }
  PeerRegion& source = known->second;
  Status status = validate(blocks, source.news.bytes);
  if (!status.ok()) return status;
  task->leases = entry.leases;
  task->lease_slot = slot;
  task->lease_generation = generation;
  task->source = {};
  if (const std::shared_ptr<AgentCore> twin = entry.twin.lock(); twin != nullptr) {
    auto hold = std::make_shared<RegionHold>(twin->regions().hold(region));
    if (!*hold) return {Code::kStale, "the peer's region is being removed"};
    task->source.mapped = (*hold)->base();
    task->source.keep = hold;
    return Status::Ok();
  }
  if (source.news.access == wire::RegionAccess::kMapped) {
    if (source.mapped == nullptr) {
      status = map_region(source.news, source.fd.get(), &source.mapping, &source.mapped);
      if (!status.ok()) return status;
    }
    task->source.mapped = source.mapped;
    task->source.keep = source.mapping;
    return Status::Ok();
  }
  task->source.pid = entry.process.pid;
  task->source.foreign_base = source.news.base;
  task->is_peer_there = [process = entry.process_fd] { return !has_exited(process->get()); };
  return Status::Ok();
}

// What a peer says elsewhere of a region it has just registered may overtake its announcement.
void AgentCore::await_region(uint64_t peer, uint32_t region, TimePoint news_by) {
  std::unique_lock lock(peers_mutex_);
  region_news_.wait_until(lock, news_by, [&] {
    const auto found = peers_.find(peer);
    if (found == peers_.end()) return true;
    const PeerEntry& entry = found->second;
    const bool may_come = std::ranges::any_of(
        entry.connections, [](const auto& connection) { return connection->is_unix(); });
    return !may_come || (entry.leases != nullptr && region <= entry.newest_region);
  });
}

Status AgentCore::can_pull(uint64_t peer, uint32_t region, TimePoint news_by) {
  await_region(peer, region, news_by);
  PullTask task;
  Status status = pull_source(peer, region, {}, 0, 0, &task);
  if (!status.ok() || task.source.mapped != nullptr) return status;
  uint8_t byte;
  const iovec local{&byte, 1};
  const iovec remote{reinterpret_cast<void*>(task.source.foreign_base), 1};
  if (process_vm_readv(task.source.pid, &local, 1, &remote, 1, 0) == 1) return Status::Ok();
  if (errno == ESRCH) return {Code::kPeerLost, "the peer's process is gone", ESRCH};
  return {Code::kUnavailable,
          std::string("the kernel does not let us read the peer's private memory (") +
              std::strerror(errno) + "); register a shared MemoryRegion there",
          errno};
}

Status AgentCore::add_region(uint8_t* base, int64_t bytes, int fd, int64_t fd_offset,
                             uint32_t* id) {
  if (is_closed()) return {Code::kCancelled, "the agent is closed"};
  Status status = regions_.add(base, bytes, fd, fd_offset, id);
  if (!status.ok()) return status;
  const RegionHold hold = regions_.hold(*id);
  for (const auto& connection : all_connections()) connection->announce(*hold);
  return Status::Ok();
}

Status AgentCore::add_opaque_region(int64_t bytes, uint32_t* id) {
  if (is_closed()) return {Code::kCancelled, "the agent is closed"};
  return regions_.add_opaque(bytes, id);
}

Status AgentCore::sight(uint64_t peer, std::shared_ptr<const PeerSight>* sight) {
  std::lock_guard lock(peers_mutex_);
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return {Code::kPeerLost, "there is no connection to the peer"};
  const PeerEntry& entry = found->second;
  if (entry.leases == nullptr) {
    return {Code::kUnavailable, "the peer is not connected over a unix socket of this host"};
  }
  *sight = std::make_shared<PeerSight>(entry.leases, [process = entry.process_fd] {
    return process == nullptr || !has_exited(process->get());
  });
  return Status::Ok();
}

Status AgentCore::remove_region(uint32_t id, double timeout_s) {
  Status status = regions_.remove(id, 0.0);
  if (status.code() == Code::kUsage) return status;
  for (const auto& connection : all_connections()) connection->announce_gone(id);
  if (status.ok()) return status;
  sweep();
  status = regions_.remove(id, std::min(timeout_s, kConfirmS));
  if (status.ok() || timeout_s <= kConfirmS) return status;
  for (const auto& connection : all_connections()) connection->drop_unconfirmed();
  return regions_.remove(id, timeout_s - kConfirmS);
}

void AgentCore::sweep() {
  leases_->sweep();
  for (const auto& connection : all_connections()) connection->sweep();
}

Status AgentCore::revoke(uint64_t lease, double timeout_s) {
  Status status = leases_->revoke(lease, 0.0);
  if (status.code() != Code::kTimeout) return status;
  sweep();
  status = leases_->revoke(lease, std::min(timeout_s, kConfirmS));
  if (status.code() != Code::kTimeout || timeout_s <= kConfirmS) return status;
  for (const auto& connection : all_connections()) connection->drop_unconfirmed();
  return leases_->revoke(lease, timeout_s - kConfirmS);
}

}  // namespace kvx
