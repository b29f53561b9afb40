// Transfers begin: which way they take, and how they are spread over connections.
#include <algorithm>

#include "agent/agent_core.h"

namespace kvx {

namespace {

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
  if (made->region->is_opaque()) {
    return {Code::kUsage, "the local memory is opaque: its own backend moves it"};
  }
  std::shared_ptr<PullTask> task;
  LeaseRef own;
  if (request.way == Way::kStream) {
    made->connections = stream_connections(connections, *request.plan);
  } else {
    const auto unix_one = std::find_if(connections.begin(), connections.end(),
                                       [](const auto& one) { return one->is_unix(); });
    if (unix_one == connections.end()) {
      return {Code::kUnavailable, "the peer is not connected over a unix socket of this host"};
    }
    Status status = request.is_write ? lend(*made, &own) : find_source(request, &task);
    if (!status.ok()) return status;
    if (request.is_write) made->connections = {*unix_one};
  }
  Status status = enter(made);
  if (!status.ok()) return status;
  *record = made;
  if (request.deadline_s <= 0.0) {
    end_early(*made, JobState::kTimedOut, Code::kTimeout);
  } else if (task != nullptr) {
    begin_pull(made, std::move(task));
  } else {
    status = request.way == Way::kPull ? begin_lent(made, request.lease, own)
                                       : begin_streams(made, request.lease);
    if (!status.ok()) lose(*made);
  }
  return Status::Ok();
}

// As many as the transfer is worth; of tcp, where there are some: a peer on this host may be
// connected both ways.
std::vector<std::weak_ptr<Connection>> AgentCore::stream_connections(
    const std::vector<std::shared_ptr<Connection>>& connections, const RemotePlan& plan) {
  std::vector<std::weak_ptr<Connection>> usable;
  for (const auto& one : connections) {
    if (!one->is_unix()) usable.push_back(one);
  }
  if (usable.empty()) usable.push_back(connections.front());
  const auto worthwhile =
      static_cast<size_t>(std::max<int64_t>(plan.total_bytes / kPartBytesMin, 1));
  usable.resize(std::min({usable.size(), worthwhile, kPartsMax, plan.local.size()}));
  return usable;
}

Status AgentCore::find_source(const RemoteRequest& request, std::shared_ptr<PullTask>* task) {
  *task = std::make_shared<PullTask>();
  return pull_source(request.peer, request.plan->remote_region, request.plan->remote,
                     request.lease.slot, request.lease.generation, task->get());
}

// For as long as the peer copies out of our memory, it looks at a lease of ours.
Status AgentCore::lend(RemoteRecord& record, LeaseRef* own) {
  LeaseTerms terms{.rights = kMayRead,
                   .peer = record.peer,
                   .ttl_s = seconds_until(record.deadline) + 1.0,
                   .blocks = record.plan->local};
  Status status = leases_->grant(record.region.again(), std::move(terms), own);
  record.own_lease = own->id;
  return status;
}

void AgentCore::begin_pull(const std::shared_ptr<RemoteRecord>& record,
                           std::shared_ptr<PullTask> task) {
  task->record = record;
  const bool is_small = record->plan->total_bytes <= kInlineBytes;
  puller_.submit(std::move(task), !is_small);
  while (is_small && puller_.help(*record)) {
  }
  if (is_small && !record->is_terminal()) puller_.wake();
}

Status AgentCore::begin_lent(const std::shared_ptr<RemoteRecord>& record, const LeaseRef& lease,
                             const LeaseRef& own) {
  const std::shared_ptr<Connection> connection = record->connections.front().lock();
  if (connection == nullptr) return {Code::kPeerLost, "the connection is closed"};
  return connection->begin_pull(record, record->id << kPartBits, lease, own);
}

// Neighbouring blocks to each connection, of about as many bytes.
Status AgentCore::begin_streams(const std::shared_ptr<RemoteRecord>& record,
                                const LeaseRef& lease) {
  const std::vector<Descriptor>& blocks = record->plan->local;
  const int64_t total = record->plan->total_bytes;
  const size_t parts = record->connections.size();
  size_t first = 0;
  int64_t reached = 0;
  for (size_t part = 0; part < parts; ++part) {
    const int64_t share = total / static_cast<int64_t>(parts) * static_cast<int64_t>(part + 1);
    size_t end = first;
    while (end < blocks.size() && (part + 1 == parts || reached < share)) {
      reached += blocks[end++].total();
    }
    if (end == first) continue;
    const std::shared_ptr<Connection> connection = record->connections[part].lock();
    if (connection == nullptr) return {Code::kPeerLost, "the connection is closed"};
    const uint64_t wire_id = (record->id << kPartBits) | part;
    const auto begin = static_cast<int64_t>(first);
    const auto count = static_cast<int64_t>(end - first);
    Status status = record->is_write ? connection->begin_write(record, wire_id, begin, count, lease)
                                     : connection->begin_read(record, wire_id, begin, count, lease);
    if (!status.ok()) return status;
    first = end;
  }
  return Status::Ok();
}

}  // namespace kvx
