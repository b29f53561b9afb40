// Our own transfers over a connection: how they begin, are given up, and go down with it.
#include "agent/agent_core.h"
#include "agent/connection.h"
#include "agent/connection_lock.h"
#include "agent/ends.h"

namespace kvx {

Status Connection::begin_read(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id,
                              int64_t first, int64_t count, const LeaseRef& lease) {
  wire::Request request = request_for(*record, first, count, lease);
  request.wants_checksums = record->plan->checksums.empty();
  const std::vector<uint8_t> body = wire::encode(request);
  Locked locked(*this);
  if (!is_open()) return {Code::kPeerLost, "the connection is closed"};
  if (!record->ledger.try_hold(1)) return Status::Ok();  // it has ended
  for (int64_t i = first; i < first + count; ++i) (void)record->ledger.begin(i);
  reads_.emplace(wire_id, std::make_unique<ReadSink>(record, first, count));
  queue_frame(wire::Type::kRead, wire_id, body);
  flush();
  return Status::Ok();
}

Status Connection::begin_write(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id,
                               int64_t first, int64_t count, const LeaseRef& lease) {
  wire::Request request = request_for(*record, first, count, lease);
  request.note = record->note;
  const std::vector<uint8_t> body = wire::encode(request);
  Locked locked(*this);
  if (!is_open()) return {Code::kPeerLost, "the connection is closed"};
  if (!record->ledger.try_hold(1)) return Status::Ok();
  for (int64_t i = first; i < first + count; ++i) (void)record->ledger.begin(i);
  auto source = std::make_shared<WriteSource>(record, wire_id, first, count);
  writes_.emplace(wire_id, Writing{record, first, count, source, false});
  queue_frame(wire::Type::kWrite, wire_id, body);
  sender_.add(std::move(source));
  flush();
  return Status::Ok();
}

Status Connection::begin_pull(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id,
                              const LeaseRef& lease, const LeaseRef& own_lease) {
  const auto blocks = static_cast<int64_t>(record->plan->local.size());
  wire::Request request = request_for(*record, 0, blocks, lease);
  request.note = record->note;
  // By the plan: a record whose time has passed already has given its region back.
  const wire::PullOrigin origin{.region = record->plan->region,
                                .lease_slot = own_lease.slot,
                                .lease_generation = own_lease.generation,
                                .blocks = record->plan->local,
                                .checksums = record->plan->checksums};
  const std::vector<uint8_t> body = wire::encode(request, origin);
  Locked locked(*this);
  if (!is_open()) return {Code::kPeerLost, "the connection is closed"};
  if (!record->ledger.try_hold(1)) return Status::Ok();
  for (int64_t i = 0; i < blocks; ++i) (void)record->ledger.begin(i);
  writes_.emplace(wire_id, Writing{record, 0, blocks, nullptr, false});
  queue_frame(wire::Type::kPull, wire_id, body);
  flush();
  return Status::Ok();
}

void Connection::finish_later(const std::shared_ptr<RemoteRecord>& record, int64_t holds,
                              int64_t settled) {
  if (!core_->finish(*record, holds, settled)) return;
  later_.push_back([core = core_, record] { core->tell(*record); });
}

void Connection::end_read(uint64_t wire_id) {
  const auto found = reads_.find(wire_id);
  if (found == reads_.end()) return;
  const std::unique_ptr<ReadSink> sink = std::move(found->second);
  reads_.erase(found);
  const bool is_confirmed = sink->is_complete() && sink->total() >= kConfirmedBytes;
  if (is_confirmed && is_open()) queue_frame(wire::Type::kCancel, wire_id, {});
  receiver_.forget(sink.get());
  finish_later(sink->record(), 1, sink->take_settled());
}

void Connection::abandon(uint64_t record_id) {
  Locked locked(*this);
  std::vector<uint64_t> gone;
  for (const auto& [wire_id, sink] : reads_) {
    if (wire_id >> kPartBits == record_id) gone.push_back(wire_id);
  }
  for (const uint64_t wire_id : gone) {
    end_read(wire_id);
    if (is_open()) queue_frame(wire::Type::kCancel, wire_id, {});
  }
  for (auto& [wire_id, writing] : writes_) {
    if (wire_id >> kPartBits != record_id || writing.is_cancelled) continue;
    writing.is_cancelled = true;
    if (writing.source != nullptr) sender_.drop(writing.source.get(), *stream_);
    gone.push_back(wire_id);
    if (is_open()) queue_frame(wire::Type::kCancel, wire_id, {});
  }
  if (!gone.empty()) flush();
}

// All that goes over it ends: ours as lost, the peer's without an answer.
void Connection::release_flows() {
  std::vector<std::shared_ptr<RemoteRecord>> lost;
  while (!reads_.empty()) {
    lost.push_back(reads_.begin()->second->record());
    end_read(reads_.begin()->first);
  }
  for (auto& [wire_id, writing] : writes_) {
    if (writing.source != nullptr) sender_.drop(writing.source.get(), *stream_);
    lost.push_back(writing.record);
    // Lost first: whoever gives back the last hold must not end it as done.
    later_.push_back([core = core_, record = writing.record] {
      core->lose(*record);
      if (core->finish(*record, 1, 0)) core->tell(*record);
    });
  }
  writes_.clear();
  for (auto& record : lost) {
    later_.push_back([core = core_, record] { core->lose(*record); });
  }
  for (auto& [wire_id, record] : pulls_) {
    later_.push_back([core = core_, record] { core->lose(*record); });
  }
  pulls_.clear();
  for (auto& [wire_id, serving] : serving_) sender_.drop(serving.get(), *stream_);
  serving_.clear();
  unconfirmed_.clear();
  for (auto& [wire_id, landing] : landings_) receiver_.forget(landing.get());
  landings_.clear();
}

}  // namespace kvx
