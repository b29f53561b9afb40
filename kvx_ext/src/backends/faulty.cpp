// The decorator behind make_faulty(). A spoiled request is either held back here (delay, hang),
// finished here (eio, enospc, drop), or sent on changed and put right when it comes back.
//
// Lock order: mutex_ may be held when the inner backend is called (it never calls the sink from
// submit() or cancel() while it is open), and never when our own sink is.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include "backends/sink_gate.h"
#include "kvx/failpoint.h"

namespace kvx {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kSectorBytes = 512;
constexpr size_t kBounceAlignment = 4096;

struct FreeBounce {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Bounce = std::unique_ptr<uint8_t[], FreeBounce>;

Bounce make_bounce(int64_t bytes) {
  const size_t rounded =
      (static_cast<size_t>(bytes) + kBounceAlignment - 1) / kBounceAlignment * kBounceAlignment;
  Bounce bounce(static_cast<uint8_t*>(std::aligned_alloc(kBounceAlignment, rounded)));
  std::memset(bounce.get(), 0, rounded);
  return bounce;
}

void flip_bit(uint8_t* data, int64_t bytes, uint64_t random) {
  const uint64_t bit = random % (static_cast<uint64_t>(bytes) * 8);
  data[bit / 8] = static_cast<uint8_t>(data[bit / 8] ^ (1U << (bit % 8)));
}

// At least one sector is left out, and of two or more at least one is written.
void tear(const uint8_t* wanted, uint8_t* sectors, int64_t bytes, uint64_t seed) {
  const int64_t count = (bytes + kSectorBytes - 1) / kSectorBytes;
  std::mt19937_64 random(seed);
  const auto lost = static_cast<int64_t>(random() % static_cast<uint64_t>(count));
  const int64_t kept = (lost + 1) % count;
  for (int64_t sector = 0; sector < count; ++sector) {
    const bool is_written = (random() & 1U) != 0;
    if (sector == lost || (sector != kept && !is_written)) continue;
    const int64_t start = sector * kSectorBytes;
    std::memcpy(sectors + start, wanted + start,
                static_cast<size_t>(std::min(kSectorBytes, bytes - start)));
  }
}

// Half, in whole device blocks where there are that many, so that O_DIRECT takes it.
int64_t half_of(int64_t bytes) {
  const int64_t unit = bytes >= 8192 ? 4096 : kSectorBytes;
  return bytes / 2 / unit * unit;
}

class FaultyBackend final : public IoBackend {
 public:
  FaultyBackend(std::shared_ptr<Failpoints> failpoints, IoSink sink)
      : failpoints_(std::move(failpoints)), gate_(std::move(sink)) {}
  ~FaultyBackend() override { (void)close(0.0); }

  Status start(const BackendFactory& factory) {
    Status status =
        factory([this](std::span<const IoCompletion> done) { on_completions(done); }, &inner_);
    if (!status.ok()) return status;
    listener_ = std::make_shared<Listener>(this);
    failpoints_->listen(listener_);
    try {
      timer_ = std::thread([this] { run_timer(); });
    } catch (const std::system_error& error) {
      return {Code::kUnavailable, error.what(), error.code().value()};
    }
    return Status::Ok();
  }

  std::string_view name() const override { return inner_->name(); }
  Status register_buffer(uint8_t* base, int64_t bytes) override {
    return inner_->register_buffer(base, bytes);
  }
  void unregister_buffer(uint8_t* base) override { inner_->unregister_buffer(base); }

  void submit(std::span<const IoRequest> requests) override {
    {
      std::lock_guard lock(mutex_);
      if (!is_closed_) {
        gate_.expect(requests.size());
        std::vector<IoRequest> onward;
        for (const IoRequest& request : requests) admit(request, &onward);
        if (!onward.empty()) inner_->submit(onward);
        return;
      }
    }
    gate_.refuse(requests);
  }

  void cancel(uint64_t token) override {
    std::lock_guard lock(mutex_);
    const auto held = std::find_if(held_.begin(), held_.end(),
                                   [&](const Held& h) { return h.request.token == token; });
    if (held == held_.end()) {
      inner_->cancel(token);
    } else if (!held->ignores_cancel) {
      held_.erase(held);
      tell({token, Code::kCancelled, 0});
    }
  }

  int64_t close(double timeout_s) override {
    if (!timer_.joinable()) return 0;
    const auto deadline = deadline_after(timeout_s);
    {
      std::lock_guard lock(mutex_);
      is_closing_ = true;
      std::erase_if(held_, [this](const Held& held) {
        if (!held.ignores_cancel) tell({held.request.token, Code::kCancelled, 0});
        return !held.ignores_cancel;
      });
    }
    const int64_t abandoned = inner_->close(timeout_s);
    (void)gate_.wait_drained(deadline);
    {
      std::lock_guard lock(mutex_);
      is_closed_ = true;
      news_.notify_all();
      // The kernel may still use the bounce buffers of what the inner backend abandoned.
      if (abandoned > 0) {
        for (auto& [token, changed] : changed_) (void)changed.bounce.release();
      }
    }
    timer_.join();
    {
      std::lock_guard lock(listener_->owner_mutex);
      listener_->owner = nullptr;
    }
    return gate_.shut();
  }

 private:
  // Outlives the backend while a Failpoints is calling it.
  struct Listener final : FaultListener {
    explicit Listener(FaultyBackend* backend) : owner(backend) {}
    void release() override {
      std::lock_guard lock(owner_mutex);
      if (owner != nullptr) owner->release_held();
    }
    std::mutex owner_mutex;
    FaultyBackend* owner;  // null once that is closed
  };
  struct Held {
    IoRequest request;
    Clock::time_point due;
    bool is_hung;
    bool ignores_cancel;
  };
  // A request that the inner backend has in another form than the caller gave it.
  struct Changed {
    IoRequest request;
    Fault fault;
    Bounce bounce;
    bool is_reading_old = false;  // kTorn, first step: what the lost sectors hold
  };

  void release_held() {
    std::lock_guard lock(mutex_);
    for (Held& held : held_) {
      if (held.is_hung) held.due = Clock::now();
    }
    news_.notify_all();
  }

  // The functions below need mutex_, but for on_completions() and run_timer().
  void tell(const IoCompletion& completion) {
    ready_.push_back(completion);
    news_.notify_all();
  }

  void admit(const IoRequest& request, std::vector<IoRequest>* onward) {
    if (is_closing_) return tell({request.token, Code::kCancelled, 0});
    const std::optional<Fault> fault = failpoints_->next(request.kind);
    const bool has_bytes = request.kind == IoKind::kSync || request.bytes > 0;
    if (!fault || !has_bytes) return onward->push_back(request);
    switch (fault->rule.action) {
      case FaultAction::kEio:
        return tell({request.token, Code::kStorage, EIO});
      case FaultAction::kEnospc:
        return tell({request.token, Code::kStorage, ENOSPC});
      case FaultAction::kDrop:
        return tell({request.token, Code::kOk, 0});
      case FaultAction::kDelay:
        held_.push_back({request, deadline_after(fault->rule.delay_s), false, false});
        return news_.notify_all();
      case FaultAction::kHang:
        held_.push_back({request, Clock::time_point::max(), true, fault->rule.ignores_cancel});
        return;
      case FaultAction::kShort:
      case FaultAction::kTorn:
      case FaultAction::kFlip:
        return onward->push_back(change(request, *fault));
    }
  }

  // Notes what to put right later and returns what to do now.
  IoRequest change(const IoRequest& request, const Fault& fault) {
    Changed changed{request, fault, nullptr};
    IoRequest onward = request;
    if (fault.rule.action == FaultAction::kShort) {
      onward.bytes = half_of(request.bytes);
    } else if (request.kind == IoKind::kWrite) {
      changed.bounce = make_bounce(request.bytes);
      onward.buffer = changed.bounce.get();
      if (fault.rule.action == FaultAction::kTorn) {
        changed.is_reading_old = true;
        onward.kind = IoKind::kRead;
      } else {
        std::memcpy(onward.buffer, request.buffer, static_cast<size_t>(request.bytes));
        flip_bit(onward.buffer, request.bytes, fault.random);
      }
    }
    changed_.insert_or_assign(request.token, std::move(changed));
    return onward;
  }

  // Puts a completion of the inner backend right; true when the request goes on instead.
  bool put_right(Changed& changed, IoCompletion* completion, IoRequest* onward) {
    const FaultRule& rule = changed.fault.rule;
    if (changed.is_reading_old) {
      // Past the end of the file the lost sectors hold zeros, as the bounce buffer does.
      if (completion->code != Code::kOk && completion->code != Code::kShort) return false;
      changed.is_reading_old = false;
      *onward = changed.request;
      onward->buffer = changed.bounce.get();
      tear(changed.request.buffer, onward->buffer, onward->bytes, changed.fault.random);
      return true;
    }
    if (completion->code != Code::kOk) return false;
    if (rule.action == FaultAction::kShort) completion->code = Code::kShort;
    if (rule.action == FaultAction::kTorn && rule.torn_reports_error) {
      *completion = {completion->token, Code::kStorage, EIO};
    }
    if (rule.action == FaultAction::kFlip && changed.request.kind == IoKind::kRead) {
      flip_bit(changed.request.buffer, changed.request.bytes, changed.fault.random);
    }
    return false;
  }

  void on_completions(std::span<const IoCompletion> completions) {
    std::vector<IoCompletion> done;
    std::vector<IoRequest> onward;
    {
      std::lock_guard lock(mutex_);
      for (IoCompletion completion : completions) {
        const auto found = changed_.find(completion.token);
        if (found != changed_.end()) {
          IoRequest next;
          if (put_right(found->second, &completion, &next)) {
            onward.push_back(next);
            continue;
          }
          changed_.erase(found);
        }
        done.push_back(completion);
      }
    }
    if (!onward.empty()) inner_->submit(onward);
    gate_.deliver(done);
  }

  void run_timer() {
    std::unique_lock lock(mutex_);
    while (true) {
      send_due();
      if (!ready_.empty()) {
        std::vector<IoCompletion> ready;
        ready.swap(ready_);
        lock.unlock();
        gate_.deliver(ready);
        lock.lock();
        continue;
      }
      if (is_closed_) return;
      const auto next = std::min_element(
          held_.begin(), held_.end(), [](const Held& a, const Held& b) { return a.due < b.due; });
      if (next == held_.end() || next->due == Clock::time_point::max()) {
        news_.wait(lock);
      } else {
        news_.wait_until(lock, Clock::time_point(next->due));
      }
    }
  }

  void send_due() {
    const auto now = Clock::now();
    std::vector<IoRequest> due;
    std::erase_if(held_, [&](const Held& held) {
      if (held.due > now) return false;
      due.push_back(held.request);
      return true;
    });
    if (due.empty()) return;
    if (!is_closing_) return inner_->submit(due);
    for (const IoRequest& request : due) ready_.push_back({request.token, Code::kCancelled, 0});
  }

  const std::shared_ptr<Failpoints> failpoints_;
  SinkGate gate_;
  std::unique_ptr<IoBackend> inner_;
  std::shared_ptr<Listener> listener_;
  std::thread timer_;

  std::mutex mutex_;
  std::condition_variable news_;
  std::vector<Held> held_;                         // mutex_
  std::vector<IoCompletion> ready_;                // mutex_
  std::unordered_map<uint64_t, Changed> changed_;  // mutex_, by token
  bool is_closing_ = false;                        // mutex_
  bool is_closed_ = false;                         // mutex_
};

}  // namespace

Status make_faulty(const BackendFactory& inner, std::shared_ptr<Failpoints> failpoints, IoSink sink,
                   std::unique_ptr<IoBackend>* backend) {
  if (failpoints == nullptr) return {Code::kUsage, "make_faulty needs Failpoints"};
  auto made = std::make_unique<FaultyBackend>(std::move(failpoints), std::move(sink));
  if (Status status = made->start(inner); !status.ok()) return status;
  *backend = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
