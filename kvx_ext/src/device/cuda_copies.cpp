#include "device/cuda_copies.h"

#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "device/copy_desk.h"
#include "device/cuda_lane.h"
#include "shim/sabotage.h"

namespace kvx {

namespace {

// A thread inside the driver cannot be called back, so the lanes and the desk are shared: close()
// leaves stuck threads behind, detached, with what they use.
class CudaCopies final : public CopyBackend {
 public:
  explicit CudaCopies(CopySink sink) : desk_(std::make_shared<CopyDesk>(std::move(sink))) {}
  ~CudaCopies() override { (void)close(0.0); }

  Status start(const std::shared_ptr<CudaDevice>& device, const CopyOptions& options) {
    for (size_t i = 0; i < kCopyDirections; ++i) {
      std::shared_ptr<CudaLane> lane;
      Status status =
          CudaLane::create(device, static_cast<CopyDirection>(i), desk_, options, &lane);
      if (!status.ok()) return status;
      lanes_.push_back(std::move(lane));
    }
    try {
      desk_->start();
      for (const auto& lane : lanes_) {
        // In this order: the completing thread ends when the submitting one has.
        threads_.emplace_back([lane] { lane->run_submitting(); });
        threads_.emplace_back([lane] { lane->run_completing(); });
      }
    } catch (const std::system_error& error) {
      return {Code::kUnavailable, std::string("cannot start a copying thread: ") + error.what(),
              error.code().value()};
    }
    return Status::Ok();
  }

  void submit(CopyRequest request) override { desk_->submit(std::move(request)); }
  void cancel(uint64_t token) override { desk_->cancel(token); }

  int64_t close(double timeout_s) override {
    if (is_closed_) return 0;
    is_closed_ = true;
    const bool is_drained = desk_->drain(time_after(timeout_s));
    const int64_t abandoned = desk_->shut();
    for (const auto& lane : lanes_) {
      if (!is_drained) lane->abandon();
    }
    for (std::thread& thread : threads_) is_drained ? thread.join() : thread.detach();
    threads_.clear();
    // Streams and staging memory go now; the object may be kept for its counters.
    std::lock_guard lock(lanes_mutex_);
    for (const auto& lane : lanes_) lane->add_stats(&final_stats_);
    lanes_.clear();
    return makes(Mistake::kFreesInFlight) ? 0 : abandoned;
  }

  CopyStats stats() const override {
    std::lock_guard lock(lanes_mutex_);
    CopyStats total = final_stats_;
    for (const auto& lane : lanes_) lane->add_stats(&total);
    total.in_flight = desk_->in_flight();
    return total;
  }

 private:
  const std::shared_ptr<CopyDesk> desk_;
  mutable std::mutex lanes_mutex_;                // close() against stats()
  std::vector<std::shared_ptr<CudaLane>> lanes_;  // lanes_mutex_
  CopyStats final_stats_;                         // lanes_mutex_; of lanes that are gone
  std::vector<std::thread> threads_;
  bool is_closed_ = false;
};

}  // namespace

Status make_cuda_copies(std::shared_ptr<CudaDevice> device, const CopyOptions& options,
                        CopySink sink, std::unique_ptr<CopyBackend>* copies) {
  if (options.ctas < 1 || options.staging_bytes < 0) {
    return {Code::kUsage, "copies need ctas >= 1 and staging_bytes >= 0"};
  }
  auto made = std::make_unique<CudaCopies>(std::move(sink));
  if (Status status = made->start(device, options); !status.ok()) return status;
  *copies = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
