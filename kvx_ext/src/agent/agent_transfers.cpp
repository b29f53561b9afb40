// Transfers begin: which way they take, and how they are spread over connections.
#include <algorithm>

#include "agent/agent_core.h"

namespace kvx {

namespace {

constexpr uint64_t kPartBits = 8;
constexpr size_t kPartsMax = 8;
constexpr int64_t kPartBytesMin = 8 << 20;  // less is not worth a second connection
// Copied on the caller's thread before submit() returns: it is over sooner than a thread wakes up.
constexpr int64_t kInlineBytes = 64 << 10;

}  // namespace

std::shared_ptr<RemoteRecord> AgentCore::make_record(bool is_write,
                                                     std::shared_ptr<const RemotePlan> plan,
                                                     TimePoint deadline) {
  return std::make_shared<RemoteRecord>(next_record_.fetch_add(1, std::memory_order_relaxed),
                                        is_write, std::move(plan), deadline);
}

Status AgentCore::submit(RemoteRequest request, std::shared_ptr<RemoteRecord>* record) {
  if (request.plan == nullptr || request.plan->local.empty()) {
    return {Code::kUsage, "a transfer needs at least one block"};
  }
  if (request.note.size() > wire::kNoteBytesMax) {
    return {Code::kUsage, "a note of " + std::to_string(request.note.size()) + " bytes; at most " +
                              std::to_string(wire::kNoteBytesMax)};
  }
  const std::vector<std::shared_ptr<Connection>> connections = connections_of(request.peer);
  if (connections.empty()) return {Code::kPeerLost, "there is no connection to the peer"};
  auto made = make_record(request.is_write, request.plan, time_after(request.deadline_s));
  made->peer = request.peer;
  made->note = std::move(request.note);
  made->region = regions_.hold(request.plan->region);
  if (!made->region) return {Code::kStale, "the local memory is not registered any more"};
  const auto unix_one = std::find_if(connections.begin(), connections.end(),
                                     [](const auto& one) { return one->is_unix(); });
  std::shared_ptr<PullTask> task;
  if (request.way == Way::kPull) {
    if (unix_one == connections.end()) {
      return {Code::kUnavailable, "the peer is not connected over a unix socket of this host"};
    }
    if (!request.is_write) {
      task = std::make_shared<PullTask>();
      Status status =
          pull_source(request.peer, request.plan->remote_region, request.plan->remote,
                      request.lease.slot, request.lease.generation, task.get());
      if (!status.ok()) return status;
    }
  }
  Status status = enter(made);
  if (!status.ok()) return status;
  *record = made;
  if (request.deadline_s <= 0.0) {
    end_early(*made, JobState::kTimedOut, Code::kTimeout);
    return Status::Ok();
  }
  if (task != nullptr) {
    status = begin_pull_read(made, std::move(task));
  } else if (request.way == Way::kPull) {
    status = begin_pull_write(made, request.lease, *unix_one);
  } else {
    status = begin_streams(made, request.lease, connections);
  }
  if (!status.ok()) lose(*made);
  return Status::Ok();
}

Status AgentCore::begin_pull_read(const std::shared_ptr<RemoteRecord>& record,
                                  std::shared_ptr<PullTask> task) {
  task->record = record;
  const bool is_small = record->plan->total_bytes <= kInlineBytes;
  puller_.submit(std::move(task), !is_small);
  while (is_small && puller_.help(*record)) {
  }
  return Status::Ok();
}

Status AgentCore::begin_pull_write(const std::shared_ptr<RemoteRecord>& record,
                                   const LeaseRef& lease,
                                   const std::shared_ptr<Connection>& connection) {
  LeaseTerms terms{.rights = kMayRead,
                   .peer = record->peer,
                   .ttl_s = seconds_until(record->deadline) + 1.0,
                   .blocks = record->plan->local};
  LeaseRef own;
  Status status = leases_->grant(record->region.again(), std::move(terms), &own);
  if (!status.ok()) return status;
  record->own_lease = own.id;
  record->connections = {connection};
  return connection->begin_pull(record, record->id << kPartBits, lease, own);
}

// Neighbouring blocks to each connection, of about as many bytes. Those of tcp, where there are
// some: a peer on this host may be connected both ways.
Status AgentCore::begin_streams(const std::shared_ptr<RemoteRecord>& record, const LeaseRef& lease,
                                const std::vector<std::shared_ptr<Connection>>& connections) {
  std::vector<std::shared_ptr<Connection>> usable;
  for (const auto& one : connections) {
    if (!one->is_unix()) usable.push_back(one);
  }
  if (usable.empty()) usable.push_back(connections.front());
  const RemotePlan& plan = *record->plan;
  const auto blocks = static_cast<int64_t>(plan.local.size());
  const auto worthwhile = static_cast<size_t>(std::max<int64_t>(plan.total_bytes / kPartBytesMin, 1));
  const size_t parts = std::min({usable.size(), worthwhile, kPartsMax, plan.local.size()});
  record->connections.assign(usable.begin(), usable.begin() + static_cast<std::ptrdiff_t>(parts));
  int64_t first = 0;
  for (size_t part = 0; part < parts; ++part) {
    int64_t count = 0;
    const int64_t share = (plan.total_bytes * static_cast<int64_t>(part + 1)) /
                          static_cast<int64_t>(parts);
    int64_t reached = 0;
    for (int64_t i = 0; i < first; ++i) reached += plan.local[static_cast<size_t>(i)].total();
    const bool is_last = part + 1 == parts;
    while (first + count < blocks && (is_last || reached < share)) {
      reached += plan.local[static_cast<size_t>(first + count)].total();
      ++count;
    }
    if (count == 0) continue;
    const uint64_t wire_id = (record->id << kPartBits) | part;
    Connection& connection = *usable[part];
    Status status = record->is_write
                        ? connection.begin_write(record, wire_id, first, count, lease)
                        : connection.begin_read(record, wire_id, first, count, lease);
    if (!status.ok()) return status;
    first += count;
  }
  return Status::Ok();
}

}  // namespace kvx
