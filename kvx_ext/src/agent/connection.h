// One stream between two agents: frames in, frames out, and the flows that go over it.
//
// Any thread may use it, under its lock: the loop when the socket is ready, whoever submits (so
// that a request leaves at once), and a thread that waits for a transfer, which then receives in
// place of the loop. What must happen outside of the lock is put off until it is given back
// (Locked).
//
// Until it is approved, greetings are all that is taken. Whatever is not exactly a frame of the
// protocol closes it, and so does what a peer could fill our memory with.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/flows.h"
#include "agent/loop.h"
#include "agent/receiver.h"
#include "agent/sender.h"
#include "agent/stream.h"
#include "kvx/agent.h"
#include "kvx/wire.h"

namespace kvx {

class AgentCore;
class Landing;
class ReadSink;
class Serving;

enum class Stage : uint8_t { kConnecting, kGreeting, kOpen, kClosed };

class Connection : public Watched,
                   public FrameHandler,
                   public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<AgentCore> core, Loop& loop, uint64_t id,
             std::unique_ptr<Stream> stream, bool is_unix, bool is_dialled, std::string address);
  ~Connection() override;

  // Watches the socket. `connects_by`: a dialled one that is not connected yet.
  Status start(bool is_connecting, TimePoint connects_by);

  uint64_t id() const { return id_; }
  // The other end is an agent of this process. Before start().
  void set_twin(std::weak_ptr<AgentCore> twin) { twin_ = std::move(twin); }
  const std::weak_ptr<AgentCore>& twin() const { return twin_; }
  uint64_t peer() const { return peer_.load(std::memory_order_acquire); }
  bool is_unix() const { return is_unix_; }
  bool is_open() const { return stage_.load(std::memory_order_acquire) == Stage::kOpen; }
  bool is_closed() const { return stage_.load(std::memory_order_acquire) == Stage::kClosed; }
  ConnectionInfo info();

  Status send_payload(wire::Type type, std::span<const uint8_t> payload);
  Status approve(uint64_t peer);
  void close(const std::string& reason);
  // Tells of a region, or that it is gone; on unix sockets only.
  void announce(const ExposedRegion& region);
  void announce_gone(uint32_t region);
  void tick(TimePoint now, double ping_s, double greeting_s);

  // Both return kPeerLost when it is closed. `part` tells apart the flows of one record.
  Status begin_read(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id, int64_t first,
                    int64_t count, const LeaseRef& lease);
  Status begin_write(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id, int64_t first,
                     int64_t count, const LeaseRef& lease);
  Status begin_pull(const std::shared_ptr<RemoteRecord>& record, uint64_t wire_id,
                    const LeaseRef& lease, const LeaseRef& own_lease);
  // The record ended early, or is to: moves no more for it, and asks the peer to stop.
  void abandon(uint64_t record_id);
  // Gives up what runs under leases and on regions that have ended.
  void sweep();
  // The peer may still be taking bytes whose lease has ended, and does not say that it has: closes.
  void drop_unconfirmed();
  // A pull that this agent made for the peer has ended.
  void finish_pull(uint64_t wire_id, RemoteRecord& record);

  // Receives on this thread until `is_over`; false when another thread does so already.
  // With `spins` it looks for a moment before it sleeps.
  bool receive_until(const std::function<bool()>& is_over, int waker, TimePoint until, bool spins);

  void on_ready(uint32_t events) override;

  int64_t served();  // of the peer's transfers, under way

 private:
  friend class ConnectionTest;
  class Locked;
  struct Writing {
    std::shared_ptr<RemoteRecord> record;
    int64_t first = 0;
    int64_t count = 0;
    std::shared_ptr<Source> source;  // null: the peer copies
    bool is_cancelled = false;       // it was asked to stop
  };

  // FrameHandler, under the lock; see receiver.h
  bool accepts(const wire::Header& header) override;
  bool defers(const wire::Header& header) override;
  bool on_frame(const wire::Header& header, std::span<const uint8_t> body,
                std::vector<UniqueFd>& fds) override;
  Sink* sink_of(const wire::Header& header, const wire::Piece& piece, bool* is_wrong) override;
  bool is_paused() const override { return is_paused_; }
  void on_piece_end(const wire::Header& header) override;

  // connection_serve.cpp
  bool on_request(const wire::Header& header, std::span<const uint8_t> body);
  bool on_pull(const wire::Header& header, std::span<const uint8_t> body);
  bool on_cancel(uint64_t id);
  bool on_done(uint64_t id, std::span<const uint8_t> body);
  bool on_region(std::span<const uint8_t> body, std::vector<UniqueFd>& fds);
  void serve_read(uint64_t id, const wire::Request& request);
  void land_write(uint64_t id, wire::Request request);
  void end_landing(uint64_t id);
  void start_pull(uint64_t id, wire::Request request, wire::PullOrigin origin);
  void refuse(uint64_t id, Code code, const std::string& message);
  void give_up(uint64_t id, const std::shared_ptr<Serving>& serving, Code code);
  void answer(uint64_t id, const wire::Done& done);

  void announce_locked(const ExposedRegion& region);
  void pump(bool is_readable);
  void pump(bool is_readable, int64_t send_budget);
  void flush();
  bool wants_to_send() const;
  void update_interest();
  void close_locked(const std::string& reason);
  void release_flows();
  void end_read(uint64_t wire_id);
  void finish_later(const std::shared_ptr<RemoteRecord>& record, int64_t holds, int64_t settled);
  void settle_finished_sources();
  void push_event(EventKind kind, std::vector<uint8_t> payload);
  void queue_frame(wire::Type type, uint64_t id, std::span<const uint8_t> body, int fd = -1);
  void settle_part(const Writing& part, const wire::Done& done);

  const std::shared_ptr<AgentCore> core_;
  Loop& loop_;
  const uint64_t id_;
  const bool is_unix_;
  const bool is_dialled_;
  const std::string address_;
  const TimePoint begun_at_;
  std::weak_ptr<AgentCore> twin_;
  std::atomic<uint64_t> peer_{0};
  std::atomic<Stage> stage_{Stage::kConnecting};

  std::mutex mutex_;  // all below
  std::unique_ptr<Stream> stream_;
  Receiver receiver_;
  Sender sender_;
  std::vector<std::function<void()>> later_;
  uint32_t interest_ = 0;
  bool is_paused_ = false;  // a greeting waits for its answer
  int helper_ = -1;  // eventfd of a waiting thread that receives and sends in place of the loop
  uint32_t helper_waits_for_ = 0;
  TimePoint connects_by_;
  TimePoint heard_at_;
  TimePoint asked_at_;  // of the ping that was not answered yet
  bool is_asked_ = false;
  int64_t bytes_in_ = 0;
  int64_t bytes_out_ = 0;
  PeerProcess process_;

  std::unordered_map<uint64_t, std::unique_ptr<ReadSink>> reads_;  // ours, by wire id
  std::unordered_map<uint64_t, Writing> writes_;                   // ours
  // Sent, but not confirmed: their memory may still be read.
  std::unordered_map<uint64_t, std::shared_ptr<Serving>> unconfirmed_;
  std::unordered_map<uint64_t, std::shared_ptr<Serving>> serving_;     // the peer's reads
  std::unordered_map<uint64_t, std::unique_ptr<Landing>> landings_;    // the peer's writes
  std::unordered_map<uint64_t, std::shared_ptr<RemoteRecord>> pulls_;  // the peer's writes
};

}  // namespace kvx
