#include "kvx/agent.h"

#include "agent/agent_core.h"
#include "agent/tls.h"

namespace kvx {

namespace {

constexpr double kDestructorBoundS = 1.0;

Status is_gone() { return {Code::kPeerLost, "the connection is closed"}; }

}  // namespace

Status Agent::create(const AgentOptions& options, std::unique_ptr<Agent>* agent) {
  if (options.io_threads < 1 || options.io_threads > 64 || options.copy_threads < 0 ||
      options.copy_threads > 1024) {
    return {Code::kUsage, "io_threads must be in 1..64, copy_threads in 0..1024"};
  }
  if (options.piece_bytes < 4096 || options.piece_bytes > wire::kPayloadBytesMax) {
    return {Code::kUsage, "piece_bytes must be in 4096.." + std::to_string(wire::kPayloadBytesMax)};
  }
  if (!(options.ping_s > 0) || !(options.greeting_s > 0) || !(options.cancel_grace_s >= 0)) {
    return {Code::kUsage, "ping_s and greeting_s must be positive, cancel_grace_s not negative"};
  }
  auto core = std::make_shared<AgentCore>(options);
  Status status = core->start();
  if (!status.ok()) {
    (void)core->close(0.0);
    return status;
  }
  agent->reset(new Agent(std::move(core)));
  return Status::Ok();
}

Agent::~Agent() { (void)core_->close(kDestructorBoundS); }

Status Agent::listen_tcp(const std::string& host, int port, std::shared_ptr<TlsContext> tls,
                         int* bound) {
  UniqueFd fd;
  Status status = listen_tcp_socket(host, port, &fd, bound);
  return status.ok() ? core_->listen(std::move(fd), false, std::move(tls)) : status;
}

Status Agent::listen_unix(const std::string& path) {
  UniqueFd fd;
  Status status = listen_unix_socket(path, &fd);
  return status.ok() ? core_->listen(std::move(fd), true, nullptr) : status;
}

Status Agent::dial_tcp(const std::string& host, int port, std::shared_ptr<TlsContext> tls,
                       double timeout_s, uint64_t* connection) {
  *connection = 0;
  UniqueFd fd;
  Status status = dial_tcp_socket(host, port, &fd);
  if (!status.ok()) return status;
  tune_tcp(fd.get());
  std::unique_ptr<Stream> stream;
  if (tls == nullptr) {
    stream = make_plain_stream(std::move(fd), false);
  } else {
    status = make_tls_stream(std::move(fd), std::move(tls), false, host, &stream);
    if (!status.ok()) return status;
  }
  return core_->adopt(std::move(stream),
                      {.is_dialled = true,
                       .is_connecting = true,
                       .timeout_s = timeout_s,
                       .address = host + ":" + std::to_string(port)},
                      connection);
}

Status Agent::dial_unix(const std::string& path, double timeout_s, uint64_t* connection) {
  *connection = 0;
  UniqueFd fd;
  Status status = dial_unix_socket(path, &fd);
  if (!status.ok()) return status;
  return core_->adopt(make_plain_stream(std::move(fd), true),
                      {.is_unix = true,
                       .is_dialled = true,
                       .is_connecting = true,
                       .timeout_s = timeout_s,
                       .address = path},
                      connection);
}

Status Agent::pair(Agent& ours_agent, Agent& theirs_agent, uint64_t* ours, uint64_t* theirs) {
  UniqueFd one;
  UniqueFd other;
  Status status = pair_sockets(&one, &other);
  if (!status.ok()) return status;
  status = ours_agent.core_->adopt(
      make_plain_stream(std::move(one), true),
      {.is_unix = true, .is_dialled = true, .address = "this process", .twin = theirs_agent.core_},
      ours);
  if (!status.ok()) return status;
  return theirs_agent.core_->adopt(
      make_plain_stream(std::move(other), true),
      {.is_unix = true, .address = "this process", .twin = ours_agent.core_}, theirs);
}

Status Agent::send_greeting(uint64_t connection, std::span<const uint8_t> payload) {
  const auto found = core_->find(connection);
  return found ? found->send_payload(wire::Type::kGreeting, payload) : is_gone();
}

Status Agent::send_message(uint64_t connection, std::span<const uint8_t> payload) {
  const auto found = core_->find(connection);
  return found ? found->send_payload(wire::Type::kMessage, payload) : is_gone();
}

Status Agent::send_note(uint64_t connection, std::span<const uint8_t> payload) {
  const auto found = core_->find(connection);
  return found ? found->send_payload(wire::Type::kNote, payload) : is_gone();
}

Status Agent::approve(uint64_t connection, uint64_t peer) {
  if (peer == kAnyPeer) return {Code::kUsage, "0 is no peer"};
  const auto found = core_->find(connection);
  return found ? found->approve(peer) : is_gone();
}

Status Agent::drop(uint64_t connection, const std::string& reason) {
  const auto found = core_->find(connection);
  if (!found) return is_gone();
  found->close(reason);
  return Status::Ok();
}

Status Agent::info(uint64_t connection, ConnectionInfo* info) const {
  const auto found = core_->find(connection);
  if (!found) return is_gone();
  *info = found->info();
  return Status::Ok();
}

Status Agent::can_pull(uint64_t peer, uint32_t region, double timeout_s) const {
  return core_->can_pull(peer, region, time_after(timeout_s));
}

Status Agent::add_region(uint8_t* base, int64_t bytes, int fd, int64_t fd_offset, uint32_t* id) {
  return core_->add_region(base, bytes, fd, fd_offset, id);
}

Status Agent::remove_region(uint32_t id, double timeout_s) {
  return core_->remove_region(id, timeout_s);
}

Status Agent::add_opaque_region(int64_t bytes, uint32_t* id) {
  return core_->add_opaque_region(bytes, id);
}

RegionHold Agent::hold_region(uint32_t id) { return core_->regions().hold(id); }

Status Agent::grant(uint32_t region, LeaseTerms terms, LeaseRef* ref) {
  RegionHold hold = core_->regions().hold(region);
  if (!hold) return {Code::kStale, "the memory is not registered any more"};
  return core_->leases().grant(std::move(hold), std::move(terms), ref);
}

Status Agent::revoke(uint64_t lease, double timeout_s) { return core_->revoke(lease, timeout_s); }
Status Agent::renew(uint64_t lease, double ttl_s) { return core_->leases().renew(lease, ttl_s); }

Status Agent::use_lease(const LeaseRef& ref, uint64_t peer, uint8_t rights,
                        std::shared_ptr<LeaseHold>* hold) {
  LeaseUse use;
  Status status = core_->leases().use(ref, peer, rights, &use);
  if (status.ok()) *hold = std::make_shared<LeaseHold>(core_, std::move(use));
  return status;
}

Status Agent::sight(uint64_t peer, std::shared_ptr<const PeerSight>* sight) const {
  return core_->sight(peer, sight);
}

Status Agent::submit(RemoteRequest request, std::shared_ptr<RemoteJob>* job) {
  std::shared_ptr<RemoteRecord> record;
  Status status = core_->submit(std::move(request), &record);
  if (status.ok()) *job = std::make_shared<RemoteJob>(core_, std::move(record));
  return status;
}

std::vector<AgentEvent> Agent::next_events(size_t max, double timeout_s) {
  return core_->events().take(max, timeout_s);
}

void Agent::wake() { core_->events().wake(); }
AgentStats Agent::stats() const { return core_->stats(); }
std::vector<Quarantined> Agent::quarantine() const { return core_->quarantine(); }
AgentCloseReport Agent::close(double timeout_s) { return core_->close(timeout_s); }
bool Agent::is_closed() const { return core_->is_closed(); }

}  // namespace kvx
