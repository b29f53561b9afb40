// An agent: the endpoint of this process that moves registered memory from and to its peers.
//
//   std::unique_ptr<Agent> agent;
//   Status status = Agent::create(options, &agent);
//   agent->listen(...); agent->dial(...);           // connections, greeted one by one
//   agent->next_events(...)                         // greetings, messages, ends; one reader
//   agent->approve(connection, peer);               // whoever reads the greetings decides
//   std::shared_ptr<RemoteJob> job;
//   status = agent->submit(request, &job);
//   job->wait(1.0);
//
// The native side moves bytes and enforces leases, deadlines and limits. Who a peer is, and whether
// its proof is right, is decided by whoever reads the events: until approve(), a connection takes
// greetings only, few, small and for a short time.
//
// Only the owner of memory ever writes it: a read is received or copied by its initiator, a write
// by its receiver. So a frozen peer can never write late into anything of ours, and what an ended
// transfer leaves in quarantine is what the peer may still be doing to its own memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvx/descriptor.h"
#include "kvx/exposed_region.h"
#include "kvx/job.h"
#include "kvx/lease_table.h"
#include "kvx/status.h"

namespace kvx {

class AgentCore;
class PeerSight;
class TlsContext;
struct RemoteRecord;

struct AgentOptions {
  int io_threads = 1;
  int copy_threads = 0;  // 0: one a CPU, at most 4
  double greeting_s = 5.0;
  int greetings_max = 64;  // connections not approved yet
  double ping_s = 1.0;     // of a connection that hears nothing
  int64_t piece_bytes = 1 << 20;
  double cancel_grace_s = 0.1;  // a cancelled write waits so long for the peer's word
};

// What both sides of a transfer are; checked once, used any number of times.
struct RemotePlan {
  uint32_t region = 0;             // local
  std::vector<Descriptor> local;   // of `region`
  std::vector<Descriptor> remote;  // of the leased region
  uint32_t remote_region = 0;
  std::vector<uint32_t> indices;    // of the lease's blocks; none: `remote` within a range lease
  std::vector<uint64_t> checksums;  // expected, or none
  std::vector<uint8_t> keys;        // kKeyBytes a block, or none: zeros
  int64_t total_bytes = 0;
};

// Fills total_bytes. kUsage: see descriptor.h, and arrays of other lengths.
Status finish_plan(RemotePlan* plan, int64_t region_bytes);

enum class Way : uint8_t {
  kStream,  // through the connections
  kPull,    // copied on this host, by the owner of the target
};

struct RemoteRequest {
  bool is_write = false;
  Way way = Way::kStream;
  uint64_t peer = 0;
  LeaseRef lease;
  std::shared_ptr<const RemotePlan> plan;
  double deadline_s = 0.0;
  // Delivered to the peer as an event once the bytes have arrived, and only then; at most
  // kNoteBytesMax.
  std::vector<uint8_t> note;
};

// Thread-safe handle, usable after its agent was closed; like kvx::Job.
class RemoteJob {
 public:
  RemoteJob(std::shared_ptr<AgentCore> core, std::shared_ptr<RemoteRecord> record)
      : core_(std::move(core)), record_(std::move(record)) {}

  uint64_t id() const;
  JobState state() const;
  bool is_terminal() const { return state() != JobState::kRunning; }
  bool is_quiesced() const;
  bool is_lost() const;  // failed because the peer is gone
  bool wait(double timeout_s) const;
  bool wait_quiesced(double timeout_s) const;
  // False when it had ended. A read ends now; a write when the peer says how far it came, or after
  // cancel_grace_s, then in quarantine.
  bool cancel() const;
  // Asks for a kEnded event; true when it has ended already, and none will come.
  bool watch() const;

  int64_t blocks() const;
  int64_t bytes() const;
  int64_t blocks_done() const;
  int64_t bytes_done() const;
  int64_t latency_ns() const;
  void codes(std::span<int32_t> target) const;
  void errnos(std::span<int32_t> target) const;
  void checksums(std::span<uint64_t> target) const;

 private:
  std::shared_ptr<AgentCore> core_;
  std::shared_ptr<RemoteRecord> record_;
};

// Work of a peer under a lease of ours that somebody else than the agent does, such as a copy
// engine. While it lives, revoking the lease waits. Usable after the agent was closed.
class LeaseHold {
 public:
  LeaseHold(std::shared_ptr<AgentCore> core, LeaseUse use)
      : core_(std::move(core)), use_(std::move(use)) {}

  const Lease& operator*() const { return *use_; }
  bool is_live() const { return use_.is_live(); }

 private:
  std::shared_ptr<AgentCore> core_;  // its table, which must outlive the use
  LeaseUse use_;
};

enum class EventKind : uint8_t {
  kOpened = 1,    // a dialled or accepted connection stands; greet it
  kGreeting = 2,  // payload from a connection that is not approved
  kMessage = 3,   // payload of a control message
  kNote = 4,      // payload of a notification
  kClosed = 5,    // payload: why, as text
  kEnded = 6,     // a watched job; `id` is its number
  kQuiet = 7,     // a job that had ended in quarantine has quiesced; `id` is its number
};

struct AgentEvent {
  EventKind kind = EventKind::kOpened;
  uint64_t connection = 0;  // 0 for kEnded and kQuiet
  uint64_t peer = 0;        // 0 before approve()
  uint64_t id = 0;
  std::vector<uint8_t> payload;
};

struct ConnectionInfo {
  uint64_t peer = 0;
  bool is_unix = false;
  bool is_dialled = false;
  bool is_encrypted = false;
  std::string address;         // of the other side
  int32_t pid = 0;             // unix: of the other process
  uint32_t uid = 0;            // unix
  double heard_ago_s = 0;      // since anything was received
  double answered_ago_s = 0;   // since a ping was answered, or nothing was asked
  int64_t unacknowledged = 0;  // tcp: segments the other host has not confirmed
  int64_t retransmits = 0;     // tcp: of the oldest of them
  int64_t bytes_in = 0;
  int64_t bytes_out = 0;
  int64_t queued_bytes = 0;  // to be sent
};

struct AgentStats {
  int64_t connections = 0;
  int64_t regions = 0;
  int64_t region_bytes = 0;
  int64_t leases = 0;
  int64_t lease_bytes = 0;
  int64_t running = 0;  // transfers of ours
  int64_t served = 0;   // of peers, under way
  int64_t quarantined = 0;
  int64_t quarantined_bytes = 0;
  int64_t reads = 0;  // ended so far
  int64_t writes = 0;
  int64_t failed = 0;
  int64_t timed_out = 0;
  int64_t cancelled = 0;
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t bytes_served = 0;
  int64_t corrupt_blocks = 0;
  int64_t stale_blocks = 0;
  int64_t refused_requests = 0;
  int64_t malformed_frames = 0;
  int64_t late_pieces = 0;  // received for transfers that had ended; thrown away
  int64_t dropped_events = 0;
};

// Ended, and not quiesced.
struct Quarantined {
  uint64_t id = 0;
  uint64_t peer = 0;
  bool is_write = false;
  int64_t bytes = 0;
  double since_s = 0;
};

struct AgentCloseReport {
  int64_t cancelled_jobs = 0;
  int64_t abandoned_jobs = 0;  // a thread of ours was still moving their bytes
  int64_t abandoned_bytes = 0;
};

// Thread-safe.
class Agent {
 public:
  static Status create(const AgentOptions& options, std::unique_ptr<Agent>* agent);
  ~Agent();  // close() with a bound of a second
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

  // Port 0 takes a free one; `port` tells which.
  Status listen_tcp(const std::string& host, int port, std::shared_ptr<TlsContext> tls, int* bound);
  // The socket file is made 0600.
  Status listen_unix(const std::string& path);
  // Both begin to connect and return; kOpened or kClosed tells how it went. `connection` is 0 when
  // nothing was begun.
  Status dial_tcp(const std::string& host, int port, std::shared_ptr<TlsContext> tls,
                  double timeout_s, uint64_t* connection);
  Status dial_unix(const std::string& path, double timeout_s, uint64_t* connection);
  // Joins two agents of this process; `ours` and `theirs` are the two ends.
  static Status pair(Agent& ours_agent, Agent& theirs_agent, uint64_t* ours, uint64_t* theirs);

  Status send_greeting(uint64_t connection, std::span<const uint8_t> payload);
  Status send_message(uint64_t connection, std::span<const uint8_t> payload);
  Status send_note(uint64_t connection, std::span<const uint8_t> payload);
  // From now on the connection belongs to `peer` (never 0) and carries everything; on a unix socket
  // the regions and the page of leases are passed.
  Status approve(uint64_t connection, uint64_t peer);
  // Ends it; what runs over it alone fails with kPeerLost.
  Status drop(uint64_t connection, const std::string& reason);
  Status info(uint64_t connection, ConnectionInfo* info) const;
  // Whether the peer's memory can be copied on this host, and why not; waits for its announcement.
  Status can_pull(uint64_t peer, uint32_t region, double timeout_s = 0.0) const;

  Status add_region(uint8_t* base, int64_t bytes, int fd, int64_t fd_offset, uint32_t* id);
  // Memory that only a backend of its own can touch.
  Status add_opaque_region(int64_t bytes, uint32_t* id);
  Status remove_region(uint32_t id, double timeout_s);
  RegionHold hold_region(uint32_t id);
  Status grant(uint32_t region, LeaseTerms terms, LeaseRef* ref);
  Status revoke(uint64_t lease, double timeout_s);
  Status renew(uint64_t lease, double ttl_s);

  // As LeaseTable::use().
  Status use_lease(const LeaseRef& ref, uint64_t peer, uint8_t rights,
                   std::shared_ptr<LeaseHold>* hold);
  // kUnavailable: the peer is not connected over a unix socket of this host.
  Status sight(uint64_t peer, std::shared_ptr<const PeerSight>* sight) const;

  Status submit(RemoteRequest request, std::shared_ptr<RemoteJob>* job);

  std::vector<AgentEvent> next_events(size_t max, double timeout_s);
  void wake();  // makes one next_events() return
  AgentStats stats() const;
  std::vector<Quarantined> quarantine() const;
  AgentCloseReport close(double timeout_s);
  bool is_closed() const;

 private:
  explicit Agent(std::shared_ptr<AgentCore> core) : core_(std::move(core)) {}
  std::shared_ptr<AgentCore> core_;
};

}  // namespace kvx
