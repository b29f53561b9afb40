#include "agent/connection.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "agent/agent_core.h"
#include "agent/connection_lock.h"
#include "agent/ends.h"

namespace kvx {

namespace {

// Moved under the lock in one go: whoever else wants the connection waits that long.
constexpr int64_t kReceiveBudget = 1 << 20;
constexpr int64_t kSendBudget = 4 << 20;
// Frames that a peer does not take: it is not reading, or asks without end.
constexpr int64_t kQueuedBytesMax = int64_t{192} << 20;
constexpr uint64_t kPartBits = 8;

double seconds_since(TimePoint begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

Connection::Connection(std::shared_ptr<AgentCore> core, Loop& loop, uint64_t id,
                       std::unique_ptr<Stream> stream, bool is_unix, bool is_dialled,
                       std::string address)
    : core_(std::move(core)),
      loop_(loop),
      id_(id),
      is_unix_(is_unix),
      is_dialled_(is_dialled),
      address_(std::move(address)),
      begun_at_(Clock::now()),
      stream_(std::move(stream)),
      sender_(core_->options().piece_bytes),
      connects_by_(begun_at_),
      heard_at_(begun_at_),
      asked_at_(begun_at_) {}

Connection::~Connection() = default;

Status Connection::start(bool is_connecting, TimePoint connects_by) {
  Locked locked(*this);
  connects_by_ = connects_by;
  interest_ = is_connecting ? uint32_t{EPOLLOUT} : uint32_t{EPOLLIN};
  stage_ = is_connecting ? Stage::kConnecting : Stage::kGreeting;
  Status status = loop_.watch(id_, stream_->fd(), interest_, shared_from_this());
  if (!status.ok()) return status;
  core_->note_greeting(1);
  if (is_unix_ && !is_connecting) (void)peer_process(stream_->fd(), &process_);
  if (!is_connecting) push_event(EventKind::kOpened, {});
  return Status::Ok();
}

void Connection::push_event(EventKind kind, std::vector<uint8_t> payload) {
  const bool fits = core_->events().push(
      {.kind = kind, .connection = id_, .peer = peer(), .payload = std::move(payload)});
  if (!fits) close_locked("its messages were not taken: " + std::to_string(kEventsMax) + " wait");
}

ConnectionInfo Connection::info() {
  Locked locked(*this);
  const TcpHealth health = is_closed() ? TcpHealth{} : tcp_health(stream_->fd());
  return {.peer = peer(),
          .is_unix = is_unix_,
          .is_dialled = is_dialled_,
          .is_encrypted = stream_->is_encrypted(),
          .address = address_,
          .pid = process_.pid,
          .uid = process_.uid,
          .heard_ago_s = seconds_since(heard_at_),
          .answered_ago_s = is_asked_ ? seconds_since(asked_at_) : 0.0,
          .unacknowledged = health.unacknowledged,
          .retransmits = health.retransmits,
          .bytes_in = bytes_in_,
          .bytes_out = bytes_out_,
          .queued_bytes = sender_.queued_bytes()};
}

int64_t Connection::served() {
  Locked locked(*this);
  return static_cast<int64_t>(serving_.size() + landings_.size() + pulls_.size());
}

void Connection::queue_frame(wire::Type type, uint64_t id, std::span<const uint8_t> body, int fd) {
  sender_.queue(type, id, body, fd);
  if (sender_.queued_bytes() > kQueuedBytesMax) {
    close_locked("it takes nothing: " + std::to_string(sender_.queued_bytes()) +
                 " bytes of frames wait for it");
  }
}

Status Connection::send_payload(wire::Type type, std::span<const uint8_t> payload) {
  if (payload.size() > wire::bytes_max(type)) {
    return {Code::kUsage, std::to_string(payload.size()) + " bytes; at most " +
                              std::to_string(wire::bytes_max(type)) + " fit one of these"};
  }
  Locked locked(*this);
  const bool may_send = type == wire::Type::kGreeting ? stage_ == Stage::kGreeting : is_open();
  if (!may_send) return {Code::kPeerLost, "the connection is closed, or not open for this"};
  if (type != wire::Type::kGreeting && sender_.queued_bytes() > kQueuedBytesMax / 2) {
    return {Code::kCapacity, "the peer takes nothing: " + std::to_string(sender_.queued_bytes()) +
                                 " bytes wait for it"};
  }
  if (type == wire::Type::kGreeting) is_paused_ = false;
  queue_frame(type, 0, payload);
  pump(true);
  return Status::Ok();
}

Status Connection::approve(uint64_t peer) {
  Locked locked(*this);
  if (stage_ != Stage::kGreeting) return {Code::kPeerLost, "the connection is closed"};
  peer_.store(peer, std::memory_order_release);
  stage_ = Stage::kOpen;
  is_paused_ = false;
  heard_at_ = Clock::now();
  core_->note_greeting(-1);
  core_->join_peer(shared_from_this(), peer, process_);
  if (is_unix_) {
    const wire::RegionNews news{.access = wire::RegionAccess::kPages,
                                .bytes = kLeaseSlots * int64_t{sizeof(LeaseWord)}};
    queue_frame(wire::Type::kRegion, 0, wire::encode(news), core_->leases().fd());
    for (const auto& region : core_->regions().all()) announce_locked(*region);
  }
  pump(true);
  return Status::Ok();
}

void Connection::announce_locked(const ExposedRegion& region) {
  const bool is_mapped = region.fd() >= 0;
  const wire::RegionNews news{
      .access = is_mapped ? wire::RegionAccess::kMapped : wire::RegionAccess::kForeign,
      .id = region.id(),
      .bytes = region.bytes(),
      .fd_offset = region.fd_offset(),
      .base = reinterpret_cast<uint64_t>(region.base())};
  queue_frame(wire::Type::kRegion, region.id(), wire::encode(news), region.fd());
}

void Connection::announce(const ExposedRegion& region) {
  Locked locked(*this);
  if (!is_open() || !is_unix_) return;
  announce_locked(region);
  pump(false);
}

void Connection::announce_gone(uint32_t region) {
  Locked locked(*this);
  if (!is_open() || !is_unix_) return;
  queue_frame(wire::Type::kRegionGone, region, {});
  pump(false);
}

void Connection::close(const std::string& reason) {
  Locked locked(*this);
  close_locked(reason);
}

void Connection::close_locked(const std::string& reason) {
  if (is_closed()) return;
  if (stage_ != Stage::kOpen) core_->note_greeting(-1);
  stage_ = Stage::kClosed;
  // The descriptor stays until nobody can be waiting on it any more.
  loop_.forget(id_, stream_->fd());
  (void)::shutdown(stream_->fd(), SHUT_RDWR);
  release_flows();
  later_.push_back(
      [core = core_, self = shared_from_this(), reason] { core->leave(self, reason); });
}

void Connection::tick(TimePoint now, double ping_s, double greeting_s) {
  Locked locked(*this);
  switch (stage_.load()) {
    case Stage::kConnecting:
      if (now >= connects_by_) close_locked("nobody answered in time");
      return;
    case Stage::kGreeting:
      if (now >=
          std::max(begun_at_, connects_by_) + std::chrono::duration_cast<Clock::duration>(
                                                  std::chrono::duration<double>(greeting_s))) {
        close_locked("it was not greeted within " + std::to_string(greeting_s) + " s");
      }
      return;
    case Stage::kOpen:
      if (is_asked_ || seconds_since(heard_at_) < ping_s) return;
      is_asked_ = true;
      asked_at_ = now;
      queue_frame(wire::Type::kPing, static_cast<uint64_t>(now.time_since_epoch().count()), {});
      pump(false);
      return;
    case Stage::kClosed:
      return;
  }
}

void Connection::pump(bool is_readable) {
  if (is_closed() || stage_ == Stage::kConnecting) return;
  if (is_readable) {
    const int64_t received = receiver_.receive(*stream_, *this, kReceiveBudget);
    if (received < 0) {
      close_locked(receiver_.failure());
      return;
    }
    bytes_in_ += received;
    if (received > 0) heard_at_ = Clock::now();
  }
  if (is_closed()) return;
  if (sender_.has_work()) {
    const int64_t sent = sender_.send(*stream_, kSendBudget, &is_send_blocked_);
    settle_finished_sources();
    if (sent < 0) {
      const std::string why = stream_->failure();
      close_locked(why.empty()
                       ? std::string("sending failed: ") + std::strerror(static_cast<int>(-sent))
                       : why);
      return;
    }
    bytes_out_ += sent;
  }
  if (!is_closed()) update_interest();
}

void Connection::update_interest() {
  if (is_closed()) return;
  uint32_t wanted = 0;
  const bool is_stuck_on_read = stream_->wants_read_to_send();
  if (!is_paused_ && !is_helped_) wanted |= EPOLLIN;
  if ((sender_.has_work() && !is_stuck_on_read) || stream_->wants_write_to_receive()) {
    wanted |= EPOLLOUT;
  }
  if (wanted == interest_) return;
  interest_ = wanted;
  loop_.change(id_, stream_->fd(), wanted);
}

void Connection::on_ready(uint32_t events) {
  Locked locked(*this);
  if (stage_ == Stage::kConnecting) {
    const int error = connect_error(stream_->fd());
    if (error != 0) {
      close_locked(std::string("connecting failed: ") + std::strerror(error));
      return;
    }
    if ((events & EPOLLOUT) == 0) return;
    stage_ = Stage::kGreeting;
    connects_by_ = Clock::now();
    if (is_unix_) (void)peer_process(stream_->fd(), &process_);
    push_event(EventKind::kOpened, {});
  }
  // While a waiting thread receives, an error or hang-up is its to find.
  const bool reads = !is_paused_ && !is_helped_;
  pump(reads);
  if (!is_closed() && is_paused_ && (events & (EPOLLHUP | EPOLLERR)) != 0) {
    close_locked("the peer closed the connection");
  }
}

bool Connection::receive_until(const std::function<bool()>& is_over, int waker, TimePoint until) {
  {
    Locked locked(*this);
    if (is_helped_ || !is_open()) return false;
    is_helped_ = true;
    update_interest();
  }
  while (!is_over() && is_open()) {
    bool wants_to_send;
    {
      Locked locked(*this);
      pump(true);
      wants_to_send = sender_.has_work();
    }
    if (is_over() || !is_open()) break;
    const TimePoint now = Clock::now();
    if (now >= until) break;
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - now);
    const timespec timeout{.tv_sec = static_cast<time_t>(left.count() / 1'000'000'000),
                           .tv_nsec = static_cast<long>(left.count() % 1'000'000'000)};
    std::array<pollfd, 2> fds{{{.fd = stream_->fd(), .events = POLLIN, .revents = 0},
                               {.fd = waker, .events = POLLIN, .revents = 0}}};
    if (wants_to_send) fds[0].events |= POLLOUT;
    if (ppoll(fds.data(), fds.size(), &timeout, nullptr) > 0 && fds[1].revents != 0) break;
  }
  Locked locked(*this);
  is_helped_ = false;
  pump(true);
  return true;
}

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
  pump(false);
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
  pump(false);
  return Status::Ok();
}

Status Connection::begin_pull(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id,
                              const LeaseRef& lease, const LeaseRef& own_lease) {
  const auto blocks = static_cast<int64_t>(record->plan->local.size());
  wire::Request request = request_for(*record, 0, blocks, lease);
  request.note = record->note;
  const wire::PullOrigin origin{.region = record->region->id(),
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
  pump(false);
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
    if (writing.source != nullptr) sender_.drop(writing.source.get());
    gone.push_back(wire_id);
    if (is_open()) queue_frame(wire::Type::kCancel, wire_id, {});
  }
  if (!gone.empty()) pump(false);
}

// All that goes over it ends: ours as lost, the peer's without an answer.
void Connection::release_flows() {
  std::vector<std::shared_ptr<RemoteRecord>> lost;
  while (!reads_.empty()) {
    lost.push_back(reads_.begin()->second->record());
    end_read(reads_.begin()->first);
  }
  for (auto& [wire_id, writing] : writes_) {
    if (writing.source != nullptr) sender_.drop(writing.source.get());
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
  for (auto& [wire_id, serving] : serving_) sender_.drop(serving.get());
  serving_.clear();
  for (auto& [wire_id, landing] : landings_) receiver_.forget(landing.get());
  landings_.clear();
}

}  // namespace kvx
