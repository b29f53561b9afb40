#include "device/emulated_copies.h"

#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "device/copy_desk.h"

namespace kvx {

namespace {

struct SharedStats {
  std::mutex mutex;
  CopyStats stats;  // mutex
};

void copy_runs(const CopyRuns& runs) {
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs.bytes[i] == 0) continue;
    std::memcpy(reinterpret_cast<void*>(runs.targets[i]),
                reinterpret_cast<const void*>(runs.sources[i]), runs.bytes[i]);
  }
}

void note(const CopyRequest& request, int64_t submit_ns, SharedStats* shared) {
  const auto direction = static_cast<size_t>(request.direction);
  const auto method = static_cast<size_t>(CopyMethod::kSingle);
  const auto runs = static_cast<int64_t>(request.runs.size());
  std::lock_guard lock(shared->mutex);
  CopyStats& stats = shared->stats;
  for (const size_t bytes : request.runs.bytes) {
    stats.bytes[direction] += static_cast<int64_t>(bytes);
  }
  ++stats.requests[direction];
  stats.runs_by_method[method] += runs;
  stats.calls_by_method[method] += runs;
  stats.submit_ns += submit_ns;
}

void run_lane(CopyDesk& desk, CopyDirection direction, SharedStats* shared) {
  std::vector<CopyRequest> requests;
  while (desk.take(direction, &requests)) {
    for (const CopyRequest& request : requests) {
      const TimePoint begin = Clock::now();
      copy_runs(request.runs);
      note(request, ns_between(begin, Clock::now()), shared);
      const CopyCompletion completion{request.token, Code::kOk, 0};
      desk.deliver({&completion, 1});
    }
  }
}

class EmulatedCopies final : public CopyBackend {
 public:
  EmulatedCopies(std::shared_ptr<Device> device, CopySink sink)
      : device_(std::move(device)),
        desk_(std::make_shared<CopyDesk>(std::move(sink))),
        stats_(std::make_shared<SharedStats>()) {}
  ~EmulatedCopies() override { (void)close(0.0); }

  void start() {
    desk_->start();
    for (size_t i = 0; i < kCopyDirections; ++i) {
      threads_.emplace_back([desk = desk_, stats = stats_, i] {
        run_lane(*desk, static_cast<CopyDirection>(i), stats.get());
      });
    }
  }

  void submit(CopyRequest request) override { desk_->submit(std::move(request)); }
  void cancel(uint64_t token) override { desk_->cancel(token); }

  int64_t close(double timeout_s) override {
    if (is_closed_) return 0;
    is_closed_ = true;
    const bool is_drained = desk_->drain(time_after(timeout_s));
    const int64_t abandoned = desk_->shut();
    for (std::thread& thread : threads_) is_drained ? thread.join() : thread.detach();
    threads_.clear();
    return abandoned;
  }

  CopyStats stats() const override {
    std::lock_guard lock(stats_->mutex);
    CopyStats stats = stats_->stats;
    stats.in_flight = desk_->in_flight();
    return stats;
  }

 private:
  const std::shared_ptr<Device> device_;
  const std::shared_ptr<CopyDesk> desk_;
  const std::shared_ptr<SharedStats> stats_;
  std::vector<std::thread> threads_;
  bool is_closed_ = false;
};

}  // namespace

Status make_emulated_copies(std::shared_ptr<Device> device, CopySink sink,
                            std::unique_ptr<CopyBackend>* copies) {
  auto made = std::make_unique<EmulatedCopies>(std::move(device), std::move(sink));
  try {
    made->start();
  } catch (const std::system_error& error) {
    return {Code::kUnavailable, std::string("cannot start a copying thread: ") + error.what(),
            error.code().value()};
  }
  *copies = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
