// Connections of an agent: listened for, adopted, joined to peers, and gone.
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "agent/agent_core.h"
#include "agent/tls.h"

namespace kvx {

namespace {

constexpr double kTickMaxS = 0.1;
constexpr double kTickMinS = 0.01;

}  // namespace

class AgentCore::Listener : public Watched {
 public:
  Listener(std::weak_ptr<AgentCore> core, UniqueFd fd, bool is_unix,
           std::shared_ptr<TlsContext> tls)
      : core_(std::move(core)), fd_(std::move(fd)), is_unix_(is_unix), tls_(std::move(tls)) {}

  int fd() const { return fd_.get(); }

  void on_ready(uint32_t) override {
    const std::shared_ptr<AgentCore> core = core_.lock();
    std::string address;
    while (core != nullptr) {
      UniqueFd accepted = accept_socket(fd_.get(), &address);
      if (!accepted) return;
      if (!core->may_greet_more()) {
        core->counters().refused_requests.fetch_add(1, std::memory_order_relaxed);
        continue;
      }
      if (!is_unix_) {
        tune_tcp(accepted.get());
        tune_connected_tcp(accepted.get());
      }
      std::unique_ptr<Stream> stream;
      Status status = Status::Ok();
      if (tls_ != nullptr) {
        status = make_tls_stream(std::move(accepted), tls_, true, "", &stream);
      } else {
        stream = make_plain_stream(std::move(accepted), is_unix_);
      }
      uint64_t id;
      if (status.ok()) {
        (void)core->adopt(std::move(stream), {.is_unix = is_unix_, .address = address}, &id);
      }
    }
  }

 private:
  const std::weak_ptr<AgentCore> core_;
  const UniqueFd fd_;
  const bool is_unix_;
  const std::shared_ptr<TlsContext> tls_;
};

Status AgentCore::start() {
  Status status = LeaseTable::create(&leases_);
  for (int i = 0; status.ok() && i < std::max(1, options_.io_threads); ++i) {
    loops_.push_back(std::make_unique<Loop>());
    status = loops_.back()->start();
  }
  if (!status.ok()) return status;
  int threads = options_.copy_threads;
  if (threads <= 0) {
    threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 4);
  }
  puller_.start(threads, [this](RemoteRecord& record, int64_t holds, int64_t settled) {
    if (finish(record, holds, settled)) tell(record);
  });
  tick();
  return Status::Ok();
}

void AgentCore::tick() {
  const TimePoint now = Clock::now();
  leases_->sweep();
  for (const auto& connection : all_connections()) {
    connection->tick(now, options_.ping_s, options_.greeting_s);
    connection->sweep();
  }
  const double every_s = std::clamp(options_.ping_s / 4, kTickMinS, kTickMaxS);
  loops_.front()->call_at(time_after(every_s), [this] { tick(); });
}

Status AgentCore::listen(UniqueFd listener, bool is_unix, std::shared_ptr<TlsContext> tls) {
  if (is_closed()) return {Code::kCancelled, "the agent is closed"};
  const uint64_t id = next_connection_.fetch_add(1);
  auto made =
      std::make_shared<Listener>(weak_from_this(), std::move(listener), is_unix, std::move(tls));
  Status status = loops_.front()->watch(id, made->fd(), EPOLLIN, made);
  std::lock_guard lock(peers_mutex_);
  if (status.ok()) listeners_[id] = std::move(made);
  return status;
}

Status AgentCore::adopt(std::unique_ptr<Stream> stream, Adopted how, uint64_t* id) {
  if (is_closed()) return {Code::kCancelled, "the agent is closed"};
  const uint64_t number = next_connection_.fetch_add(1);
  Loop& loop = *loops_[number % loops_.size()];
  auto made = std::make_shared<Connection>(shared_from_this(), loop, number, std::move(stream),
                                           how.is_unix, how.is_dialled, std::move(how.address));
  made->set_twin(std::move(how.twin));
  {
    std::lock_guard lock(peers_mutex_);
    connections_[number] = made;
  }
  *id = number;
  Status status = made->start(how.is_connecting, time_after(how.timeout_s));
  if (!status.ok()) {
    std::lock_guard lock(peers_mutex_);
    connections_.erase(number);
  }
  return status;
}

std::shared_ptr<Connection> AgentCore::find(uint64_t id) const {
  std::lock_guard lock(peers_mutex_);
  const auto found = connections_.find(id);
  return found == connections_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<Connection>> AgentCore::all_connections() const {
  std::lock_guard lock(peers_mutex_);
  std::vector<std::shared_ptr<Connection>> all;
  for (const auto& [id, connection] : connections_) all.push_back(connection);
  return all;
}

std::vector<std::shared_ptr<Connection>> AgentCore::connections_of(uint64_t peer) const {
  std::lock_guard lock(peers_mutex_);
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return {};
  return found->second.connections;
}

void AgentCore::join_peer(const std::shared_ptr<Connection>& connection, uint64_t peer,
                          const PeerProcess& process) {
  std::lock_guard lock(peers_mutex_);
  PeerEntry& entry = peers_[peer];
  entry.connections.push_back(connection);
  if (!connection->is_unix()) return;
  entry.process = process;
  entry.twin = connection->twin();
  // Numbers of processes are used again; this stands for the one that is there now.
  const long opened = syscall(SYS_pidfd_open, process.pid, 0U);
  entry.process_fd = std::make_shared<UniqueFd>(static_cast<int>(opened));
}

void AgentCore::leave(const std::shared_ptr<Connection>& connection, const std::string& reason) {
  const uint64_t peer = connection->peer();
  PeerEntry gone;
  {
    std::lock_guard lock(peers_mutex_);
    connections_.erase(connection->id());
    const auto found = peers_.find(peer);
    if (found != peers_.end()) {
      std::erase(found->second.connections, connection);
      if (connection->is_unix()) {
        std::swap(gone.regions, found->second.regions);
        gone.leases = std::move(found->second.leases);
      }
      if (found->second.connections.empty()) peers_.erase(found);
    }
    region_news_.notify_all();
  }
  events_.push({.kind = EventKind::kClosed,
                .connection = connection->id(),
                .peer = peer,
                .payload = {reason.begin(), reason.end()}});
}

}  // namespace kvx
