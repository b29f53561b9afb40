// What the peer asks for: reads that are served, writes that land, writes that are pulled.
//
// Every request names a lease; nothing is touched that it does not cover, and nothing after it has
// ended. A request that is refused is answered; only one that breaks the protocol closes it all.
#include "agent/agent_core.h"
#include "agent/connection.h"
#include "agent/connection_lock.h"
#include "agent/ends.h"

namespace kvx {

namespace {

// Under way for one peer at a time; more are refused, and may be tried again.
constexpr size_t kServedMax = 4096;
// Copied by the loop itself: a thread that has to wake up first would take longer.
constexpr int64_t kInlineBytes = 256 << 10;

// The bytes of an opaque region are not for the CPU.
Status check_touchable(const LeaseUse& use) {
  if (!use->region->is_opaque()) return Status::Ok();
  return {Code::kUnavailable, "the leased memory is of a device, which this way does not reach"};
}

TimePoint deadline_of(const wire::Request& request) {
  return time_after(static_cast<double>(request.deadline_ms) * 1e-3);
}

}  // namespace

void Connection::answer(uint64_t id, const wire::Done& done) {
  queue_frame(wire::Type::kDone, id, wire::encode(done));
}

void Connection::refuse(uint64_t id, Code code, const std::string& message) {
  core_->counters().refused_requests.fetch_add(1, std::memory_order_relaxed);
  answer(id, {.code = code, .message = message.substr(0, 512)});
}

bool Connection::on_request(const wire::Header& header, std::span<const uint8_t> body) {
  wire::Request request;
  if (!wire::decode(body, &request)) return false;
  if (serving_.contains(header.id) || landings_.contains(header.id) ||
      unconfirmed_.contains(header.id)) {
    return false;
  }
  if (serving_.size() + unconfirmed_.size() + landings_.size() + pulls_.size() >= kServedMax) {
    refuse(header.id, Code::kCapacity, "too many requests at once; ask again");
  } else if (header.type == wire::Type::kRead) {
    serve_read(header.id, request);
  } else {
    land_write(header.id, std::move(request));
  }
  return true;
}

void Connection::serve_read(uint64_t id, const wire::Request& request) {
  Granted granted{.deadline = deadline_of(request)};
  Status status = core_->leases().use(request.lease, peer(), kMayRead, &granted.use);
  if (status.ok()) status = check_touchable(granted.use);
  if (status.ok()) status = resolve(*granted.use, request, &granted.named);
  if (!status.ok()) {
    refuse(id, status.code(), status.message());
    return;
  }
  auto serving = std::make_shared<Serving>(std::move(granted), id, request.wants_checksums);
  if (!serving->is_kept()) loop_.stay_awake();
  serving_.emplace(id, serving);
  sender_.add(std::move(serving));
}

void Connection::land_write(uint64_t id, wire::Request request) {
  Granted granted{.deadline = deadline_of(request)};
  Status status = core_->leases().use(request.lease, peer(), kMayWrite, &granted.use);
  if (status.ok()) status = check_touchable(granted.use);
  if (status.ok()) status = resolve(*granted.use, request, &granted.named);
  if (!status.ok()) {
    refuse(id, status.code(), status.message());
    return;
  }
  landings_.emplace(id, std::make_unique<Landing>(std::move(granted), std::move(request.note)));
}

void Connection::end_landing(uint64_t id) {
  const auto found = landings_.find(id);
  if (found == landings_.end()) return;
  const std::unique_ptr<Landing> landing = std::move(found->second);
  landings_.erase(found);
  receiver_.forget(landing.get());
  const wire::Done done = landing->outcome();
  landing->release();
  core_->counters().bytes_served.fetch_add(landing->position(), std::memory_order_relaxed);
  std::vector<uint8_t> note = landing->take_note();
  const bool is_whole = done.code == Code::kOk && done.failures.empty();
  if (is_whole && !note.empty()) push_event(EventKind::kNote, std::move(note));
  if (landing->total() < kConfirmedBytes) loop_.stay_awake();
  answer(id, done);
}

// Reads that were sent to the end, or may go no further.
void Connection::settle_finished_sources() {
  for (const std::shared_ptr<Source>& source : sender_.take_finished()) {
    if (!source->is_to_initiator()) continue;  // ours: the receiver tells how it went
    const auto found = serving_.find(source->id());
    if (found == serving_.end() || found->second != source) continue;
    const std::shared_ptr<Serving> serving = std::move(found->second);
    serving_.erase(found);
    const Code code = serving->may_read();
    if (serving->is_at_end()) {
      core_->counters().bytes_served.fetch_add(serving->bytes(), std::memory_order_relaxed);
      if (serving->is_kept()) unconfirmed_.emplace(source->id(), serving);
    } else if (code != Code::kOk) {
      give_up(source->id(), serving, code);
    }
  }
}

// Answers a read that goes no further. What was lent of it to the socket may be on its way still:
// its memory is let go of when the initiator, behind all that, confirms the answer.
void Connection::give_up(uint64_t id, const std::shared_ptr<Serving>& serving, Code code) {
  sender_.drop(serving.get(), *stream_);
  answer(id, {.code = code, .message = "the lease or the time of the read ended"});
  if (serving->is_kept()) {
    unconfirmed_.emplace(id, serving);
  } else {
    serving->release();
  }
}

bool Connection::on_cancel(uint64_t id) {
  if (unconfirmed_.erase(id) > 0) return true;
  if (const auto found = serving_.find(id); found != serving_.end()) {
    const std::shared_ptr<Serving> serving = std::move(found->second);
    serving_.erase(found);
    serving->cancel();
    give_up(id, serving, Code::kCancelled);
    return true;
  }
  if (const auto found = landings_.find(id); found != landings_.end()) {
    found->second->cancel();
    end_landing(id);
    return true;
  }
  if (const auto found = pulls_.find(id); found != pulls_.end()) {
    later_.push_back([core = core_, record = found->second] {
      core->end_early(*record, JobState::kCancelled, Code::kCancelled);
    });
  }
  return true;
}

bool Connection::on_pull(const wire::Header& header, std::span<const uint8_t> body) {
  wire::Request request;
  wire::PullOrigin origin;
  if (!is_unix_ || !wire::decode(body, &request, &origin)) return false;
  if (pulls_.contains(header.id)) return false;
  if (serving_.size() + unconfirmed_.size() + landings_.size() + pulls_.size() >= kServedMax) {
    refuse(header.id, Code::kCapacity, "too many requests at once; ask again");
    return true;
  }
  start_pull(header.id, std::move(request), std::move(origin));
  return true;
}

void Connection::start_pull(uint64_t id, wire::Request request, wire::PullOrigin origin) {
  auto use = std::make_shared<LeaseUse>();
  NamedBlocks named;
  Status status = core_->leases().use(request.lease, peer(), kMayWrite, use.get());
  if (status.ok()) status = check_touchable(*use);
  if (status.ok()) status = resolve(**use, request, &named);
  if (status.ok()) status = validate_fit(named.blocks, origin.blocks);
  auto task = std::make_shared<PullTask>();
  if (status.ok()) {
    status = core_->pull_source(peer(), origin.region, origin.blocks, origin.lease_slot,
                                origin.lease_generation, task.get());
  }
  auto plan = std::make_shared<RemotePlan>();
  std::shared_ptr<RemoteRecord> record;
  if (status.ok()) {
    plan->local = std::move(named.blocks);
    plan->remote = std::move(origin.blocks);
    plan->checksums = std::move(origin.checksums);
    plan->keys = std::move(named.keys);
    for (const Descriptor& block : plan->local) plan->total_bytes += block.total();
    record = core_->make_record(true, plan, deadline_of(request));
    record->is_served = true;
    record->peer = peer();
    record->region = (*use)->region.again();
    record->note = std::move(request.note);
    // Before it is entered: from then on its deadline may end it on another thread.
    record->on_quiesced = [use, id, keep = weak_from_this(), weak = std::weak_ptr(record)] {
      use->release();
      const std::shared_ptr<RemoteRecord> over = weak.lock();
      const std::shared_ptr<Connection> connection = keep.lock();
      if (over != nullptr && connection != nullptr) connection->finish_pull(id, *over);
    };
    status = core_->enter(record);
  }
  if (!status.ok()) {
    refuse(id, status.code(), status.message());
    return;
  }
  task->record = record;
  task->may_write = [use] { return use->is_live(); };
  pulls_.emplace(id, record);
  later_.push_back([core = core_, record, task = std::move(task)] {
    const bool is_small = record->plan->total_bytes <= kInlineBytes;
    core->puller().submit(task, !is_small);
    while (is_small && core->puller().help(*record)) {
    }
    if (is_small && !record->is_terminal()) core->puller().wake();
  });
}

void Connection::finish_pull(uint64_t wire_id, RemoteRecord& record) {
  wire::Done done;
  bool has_sum = false;
  const auto blocks = static_cast<int64_t>(record.plan->local.size());
  // What was being copied when its time was over says that it was cancelled, the rest that it was
  // skipped: tell why.
  const bool is_late = record.state.load() == JobState::kTimedOut;
  for (int64_t i = 0; i < blocks; ++i) {
    auto code = static_cast<Code>(record.ledger.code(i));
    if (is_late && (code == Code::kCancelled || code == Code::kSkipped)) code = Code::kTimeout;
    done.checksums.push_back(code == Code::kOk ? record.ledger.checksum(i) : 0);
    has_sum |= code == Code::kOk;
    if (code == Code::kOk) continue;
    done.failures.push_back({.block = static_cast<uint32_t>(i),
                             .code = code,
                             .error_number = record.ledger.error_number(i)});
  }
  if (!has_sum) done.checksums.clear();
  Locked locked(*this);
  pulls_.erase(wire_id);
  if (record.plan->total_bytes <= kInlineBytes) loop_.stay_awake();
  if (!is_open()) return;
  core_->counters().bytes_served.fetch_add(record.plan->total_bytes, std::memory_order_relaxed);
  if (done.failures.empty() && !record.note.empty()) {
    push_event(EventKind::kNote, std::move(record.note));
  }
  answer(wire_id, done);
  flush();
}

void Connection::drop_unconfirmed() {
  Locked locked(*this);
  const bool is_late = std::any_of(unconfirmed_.begin(), unconfirmed_.end(), [](const auto& one) {
    return one.second->may_read() != Code::kOk;
  });
  if (is_late) close_locked("it does not take bytes whose lease has ended");
}

// What runs under leases that have ended lets go of them, so that whoever revokes need not wait for
// a peer that takes nothing.
void Connection::sweep() {
  Locked locked(*this);
  std::vector<uint64_t> gone;
  for (const auto& [id, serving] : serving_) {
    if (serving->may_read() != Code::kOk) gone.push_back(id);
  }
  for (const uint64_t id : gone) {
    const std::shared_ptr<Serving> serving = std::move(serving_.at(id));
    serving_.erase(id);
    give_up(id, serving, serving->may_read());
  }
  std::erase_if(unconfirmed_, [](const auto& one) {
    return one.second->may_read() == Code::kTimeout;  // nobody waits for it any more
  });
  gone.clear();
  for (const auto& [id, landing] : landings_) {
    if (!landing->may_write()) gone.push_back(id);
  }
  for (const uint64_t id : gone) end_landing(id);
  flush();
}

}  // namespace kvx
