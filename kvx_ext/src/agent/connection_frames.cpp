// Frames that arrive: what they are, what may come when, and what they say about our transfers.
#include "agent/agent_core.h"
#include "agent/connection.h"
#include "agent/connection_lock.h"
#include "agent/ends.h"

namespace kvx {

wire::Request request_for(const RemoteRecord& record, int64_t first, int64_t count,
                          const LeaseRef& lease) {
  const RemotePlan& plan = *record.plan;
  const auto begin = static_cast<size_t>(first);
  const auto end = static_cast<size_t>(first + count);
  const double left_ms = seconds_until(record.deadline) * 1e3;
  wire::Request request{.lease = lease,
                        .deadline_ms = static_cast<uint32_t>(std::clamp(left_ms, 1.0, 4e9))};
  if (plan.indices.empty()) {
    request.descriptors.assign(plan.remote.begin() + static_cast<std::ptrdiff_t>(begin),
                               plan.remote.begin() + static_cast<std::ptrdiff_t>(end));
  } else {
    request.indices.assign(plan.indices.begin() + static_cast<std::ptrdiff_t>(begin),
                           plan.indices.begin() + static_cast<std::ptrdiff_t>(end));
  }
  if (!plan.keys.empty()) {
    request.keys.assign(plan.keys.begin() + static_cast<std::ptrdiff_t>(begin * kKeyBytes),
                        plan.keys.begin() + static_cast<std::ptrdiff_t>(end * kKeyBytes));
  }
  return request;
}

namespace {

// Whether it is about the blocks of a transfer of `count`, and says of none beyond the first `sent`
// that it has arrived.
bool fits(const wire::Done& done, size_t count, size_t sent) {
  if (!done.checksums.empty() && done.checksums.size() != count) return false;
  size_t named_behind = 0;
  for (const wire::BlockFailure& failure : done.failures) {
    if (failure.block >= count) return false;
    if (failure.block < sent) continue;
    if (failure.code == Code::kOk) return false;
    ++named_behind;
  }
  return done.code != Code::kOk || named_behind == count - sent;
}

}  // namespace

bool Connection::accepts(const wire::Header& header) {
  const bool is_greeting = header.type == wire::Type::kGreeting;
  switch (stage_.load(std::memory_order_relaxed)) {
    case Stage::kGreeting:
      return is_greeting;
    case Stage::kOpen:
      return !is_greeting;
    default:
      return false;
  }
}

// The other side may have approved us already, and go on.
bool Connection::defers(const wire::Header& header) {
  if (stage_ != Stage::kGreeting || header.type == wire::Type::kGreeting) return false;
  is_paused_ = true;
  return true;
}

bool Connection::on_frame(const wire::Header& header, std::span<const uint8_t> body,
                          std::vector<UniqueFd>& fds) {
  switch (header.type) {
    case wire::Type::kGreeting:
      is_paused_ = true;
      push_event(EventKind::kGreeting, {body.begin(), body.end()});
      return true;
    case wire::Type::kMessage:
      push_event(EventKind::kMessage, {body.begin(), body.end()});
      return true;
    case wire::Type::kNote:
      push_event(EventKind::kNote, {body.begin(), body.end()});
      return true;
    case wire::Type::kRead:
    case wire::Type::kWrite:
      return on_request(header, body);
    case wire::Type::kPull:
      return on_pull(header, body);
    case wire::Type::kDone:
      return on_done(header.id, body);
    case wire::Type::kCancel:
      return on_cancel(header.id);
    case wire::Type::kPing:
      queue_frame(wire::Type::kPong, header.id, {});
      return true;
    case wire::Type::kPong:
      is_asked_ = false;
      return true;
    case wire::Type::kRegion:
      return on_region(body, fds);
    case wire::Type::kRegionGone:
      core_->drop_peer_region(peer(), static_cast<uint32_t>(header.id));
      return is_unix_;
    case wire::Type::kPiece:
      break;
  }
  return false;
}

bool Connection::on_region(std::span<const uint8_t> body, std::vector<UniqueFd>& fds) {
  wire::RegionNews news;
  if (!is_unix_ || !wire::decode(body, &news)) return false;
  UniqueFd fd;
  if (news.access != wire::RegionAccess::kForeign) {
    if (fds.empty()) return false;
    fd = std::move(fds.front());
    fds.erase(fds.begin());
  }
  return core_->add_peer_region(peer(), news, std::move(fd)).ok();
}

Sink* Connection::sink_of(const wire::Header& header, const wire::Piece&, bool*) {
  Sink* sink = nullptr;
  if ((header.flags & wire::kToInitiator) != 0) {
    const auto found = reads_.find(header.id);
    if (found != reads_.end()) sink = found->second.get();
  } else {
    const auto found = landings_.find(header.id);
    if (found != landings_.end()) sink = found->second.get();
  }
  if (sink == nullptr) core_->counters().late_pieces.fetch_add(1, std::memory_order_relaxed);
  return sink;
}

void Connection::on_piece_end(const wire::Header& header) {
  if ((header.flags & wire::kToInitiator) == 0) {
    const auto found = landings_.find(header.id);
    if (found == landings_.end()) return;
    if (found->second->is_settled() || !found->second->may_write()) end_landing(header.id);
    return;
  }
  const auto found = reads_.find(header.id);
  if (found == reads_.end()) return;
  if (found->second->is_complete()) {
    end_read(header.id);
  } else if (const int64_t settled = found->second->take_settled(); settled > 0) {
    finish_later(found->second->record(), 0, settled);
  }
}

// The peer has ended what we asked for: all of a write, and a read that it could not go on with.
bool Connection::on_done(uint64_t id, std::span<const uint8_t> body) {
  wire::Done done;
  if (!wire::decode(body, &done)) return false;
  const auto read = reads_.find(id);
  if (read != reads_.end()) {
    if (!fits(done, static_cast<size_t>(read->second->count()), 0)) return false;
    if (done.code == Code::kOk) return false;  // pieces say that, not this
    const std::shared_ptr<RemoteRecord> record = read->second->record();
    const int64_t first = read->second->first();
    int64_t settled = 0;
    for (int64_t i = first; i < first + read->second->count(); ++i) {
      if (record->ledger.settle(i, done.code, 0, 0)) ++settled;
    }
    record->has_failed.store(true, std::memory_order_relaxed);
    finish_later(record, 0, settled);
    end_read(id);
    queue_frame(wire::Type::kCancel, id, {});  // all that came before it was taken
    return true;
  }
  const auto write = writes_.find(id);
  if (write == writes_.end()) {
    // It was given up here. Its receiver may wait to hear that what was on its way was taken.
    queue_frame(wire::Type::kCancel, id, {});
    return true;
  }
  const Writing& asked = write->second;
  const int64_t sent = asked.source == nullptr ? asked.count : asked.source->ended_blocks();
  if (!fits(done, static_cast<size_t>(asked.count), static_cast<size_t>(sent))) return false;
  const Writing part = std::move(write->second);
  writes_.erase(write);
  if (part.source != nullptr) sender_.drop(part.source.get(), *stream_);
  settle_part(part, done);
  return true;
}

void Connection::settle_part(const Writing& part, const wire::Done& done) {
  RemoteRecord& record = *part.record;
  const auto count = static_cast<size_t>(part.count);
  std::vector<Code> codes(count, done.code);
  std::vector<int32_t> errors(count, 0);
  for (const wire::BlockFailure& failure : done.failures) {
    codes[failure.block] = failure.code;
    errors[failure.block] = failure.error_number;
  }
  int64_t settled = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t checksum = done.checksums.size() == count ? done.checksums[i] : 0;
    const int64_t block = part.first + static_cast<int64_t>(i);
    if (!record.ledger.settle(block, codes[i], errors[i], checksum)) continue;
    ++settled;
    if (codes[i] != Code::kOk) record.has_failed.store(true, std::memory_order_relaxed);
  }
  finish_later(part.record, 1, settled);
}

}  // namespace kvx
