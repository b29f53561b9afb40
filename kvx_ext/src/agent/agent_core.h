// The agent without its door: regions, leases, connections, peers, and the transfers under way.
//
// Owned by the agent, by its threads' work and by every handle of a transfer. Lock order: a
// connection, then a record, then any one of the agent's tables. Whoever ends a record holds none
// of them, or only a connection that puts the rest off (Connection::Locked).
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/connection.h"
#include "agent/event_queue.h"
#include "agent/loop.h"
#include "agent/puller.h"
#include "agent/remote_job.h"
#include "kvx/agent.h"
#include "kvx/peer_sight.h"

namespace kvx {

// A region of a peer on this host.
struct PeerRegion {
  wire::RegionNews news;
  UniqueFd fd;
  std::shared_ptr<void> mapping;  // once it was needed
  uint8_t* mapped = nullptr;
};

struct PeerEntry {
  std::vector<std::shared_ptr<Connection>> connections;
  std::unordered_map<uint32_t, PeerRegion> regions;
  uint32_t newest_region = 0;  // of those that were ever announced; numbers only grow
  std::shared_ptr<const LeaseView> leases;
  PeerProcess process;
  std::shared_ptr<UniqueFd> process_fd;  // readable once it has exited
  std::weak_ptr<AgentCore> twin;         // an agent of this process
};

struct AgentCounters {
  std::atomic<int64_t> running{0}, quarantined{0}, quarantined_bytes{0};
  std::atomic<int64_t> reads{0}, writes{0}, failed{0}, timed_out{0}, cancelled{0};
  std::atomic<int64_t> bytes_read{0}, bytes_written{0}, bytes_served{0};
  std::atomic<int64_t> corrupt_blocks{0}, stale_blocks{0}, refused_requests{0};
  std::atomic<int64_t> malformed_frames{0}, late_pieces{0};
};

class AgentCore : public std::enable_shared_from_this<AgentCore> {
 public:
  explicit AgentCore(const AgentOptions& options) : options_(options) {}
  Status start();
  AgentCloseReport close(double timeout_s);
  bool is_closed() const { return is_closed_.load(std::memory_order_acquire); }

  const AgentOptions& options() const { return options_; }
  RegionTable& regions() { return regions_; }
  LeaseTable& leases() { return *leases_; }
  EventQueue& events() { return events_; }
  AgentCounters& counters() { return counters_; }
  Puller& puller() { return puller_; }

  // agent_connections.cpp
  Status listen(UniqueFd listener, bool is_unix, std::shared_ptr<TlsContext> tls);
  struct Adopted {
    bool is_unix = false;
    bool is_dialled = false;
    bool is_connecting = false;
    double timeout_s = 0;
    std::string address;
    std::weak_ptr<AgentCore> twin;
  };
  Status adopt(std::unique_ptr<Stream> stream, Adopted how, uint64_t* id);
  std::shared_ptr<Connection> find(uint64_t id) const;
  std::vector<std::shared_ptr<Connection>> all_connections() const;
  // The connection is approved, or has closed.
  void join_peer(const std::shared_ptr<Connection>& connection, uint64_t peer,
                 const PeerProcess& process);
  void leave(const std::shared_ptr<Connection>& connection, const std::string& reason);
  bool may_greet_more() const { return greeting_.load() < options_.greetings_max; }
  void note_greeting(int64_t change) { greeting_.fetch_add(change); }
  // What a peer on this host announced.
  Status add_peer_region(uint64_t peer, const wire::RegionNews& news, UniqueFd fd);
  void drop_peer_region(uint64_t peer, uint32_t region);
  Status add_region(uint8_t* base, int64_t bytes, int fd, int64_t fd_offset, uint32_t* id);
  Status add_opaque_region(int64_t bytes, uint32_t* id);
  Status remove_region(uint32_t id, double timeout_s);
  Status revoke(uint64_t lease, double timeout_s);
  void sweep();

  // agent_transfers.cpp
  Status submit(RemoteRequest request, std::shared_ptr<RemoteRecord>* record);
  // Fills where the bytes of a region of the peer are found, and its page of leases. kUnavailable:
  // they cannot be copied on this host, and why.
  void await_region(uint64_t peer, uint32_t region, TimePoint news_by);
  Status pull_source(uint64_t peer, uint32_t region, std::span<const Descriptor> blocks,
                     uint32_t slot, uint64_t generation, PullTask* task);
  Status can_pull(uint64_t peer, uint32_t region, TimePoint news_by);
  Status sight(uint64_t peer, std::shared_ptr<const PeerSight>* sight);

  // agent_ends.cpp
  // Gives counts back and ends the record when they reach zero. True: tell() is due, and holds no
  // lock when it is called.
  [[nodiscard]] bool finish(RemoteRecord& record, int64_t holds, int64_t settled);
  // Does what an end brings with it: notes, answers, memory given back.
  void tell(RemoteRecord& record);
  bool end_early(RemoteRecord& record, JobState state, Code begun_code);
  void lose(RemoteRecord& record);  // its peer is gone
  std::shared_ptr<RemoteRecord> make_record(bool is_write, std::shared_ptr<const RemotePlan> plan,
                                            TimePoint deadline);
  // Adds a record to those under way; its deadline counts from here.
  Status enter(const std::shared_ptr<RemoteRecord>& record);
  bool cancel(RemoteRecord& record);
  bool wait(RemoteRecord& record, double timeout_s);
  bool watch(RemoteRecord& record);
  std::vector<Quarantined> quarantine() const;
  AgentStats stats() const;

 private:
  class Listener;

  static std::vector<std::weak_ptr<Connection>> stream_connections(
      const std::vector<std::shared_ptr<Connection>>& connections, const RemotePlan& plan);
  Status find_source(const RemoteRequest& request, std::shared_ptr<PullTask>* task);
  Status lend(RemoteRecord& record, LeaseRef* own);
  void begin_pull(const std::shared_ptr<RemoteRecord>& record, std::shared_ptr<PullTask> task);
  Status begin_lent(const std::shared_ptr<RemoteRecord>& record, const LeaseRef& lease,
                    const LeaseRef& own);
  Status begin_streams(const std::shared_ptr<RemoteRecord>& record, const LeaseRef& lease);
  std::vector<std::shared_ptr<Connection>> connections_of(uint64_t peer) const;

  void end(RemoteRecord& record, JobState state);
  void quiesce(RemoteRecord& record);
  void count_end(const RemoteRecord& record, JobState state);
  void detach(RemoteRecord& record);
  void expire();
  void tick();

  const AgentOptions options_;
  RegionTable regions_;
  std::unique_ptr<LeaseTable> leases_;
  EventQueue events_;
  AgentCounters counters_;
  Puller puller_;
  std::vector<std::unique_ptr<Loop>> loops_;
  std::atomic<uint64_t> next_connection_{1};
  std::atomic<uint64_t> next_record_{1};
  std::atomic<int64_t> greeting_{0};
  std::atomic<bool> is_closed_{false};

  mutable std::mutex peers_mutex_;
  std::condition_variable region_news_;  // a peer announced one, or its connection is gone
  std::unordered_map<uint64_t, std::shared_ptr<Connection>> connections_;  // peers_mutex_
  std::unordered_map<uint64_t, PeerEntry> peers_;                          // peers_mutex_
  std::unordered_map<uint64_t, std::shared_ptr<Listener>> listeners_;      // peers_mutex_

  mutable std::mutex records_mutex_;
  std::condition_variable records_emptied_;
  std::unordered_map<uint64_t, std::shared_ptr<RemoteRecord>> records_;  // records_mutex_
  std::set<std::pair<TimePoint, uint64_t>> deadlines_;                   // records_mutex_
  TimePoint deadline_alarm_ = TimePoint::max();                          // records_mutex_
};

}  // namespace kvx
