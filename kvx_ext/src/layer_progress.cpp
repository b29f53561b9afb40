#include "kvx/layer_progress.h"

#include <algorithm>

#include "clock.h"

namespace kvx {

int LayerProgress::ready() const {
  std::lock_guard lock(mutex_);
  return ready_;
}

void LayerProgress::join(uint64_t job) {
  std::lock_guard lock(mutex_);
  done_.emplace(job, 0);
}

void LayerProgress::advance(uint64_t job, int layers_done) {
  std::lock_guard lock(mutex_);
  int& done = done_[job];
  if (layers_done <= done) return;
  done = layers_done;
  publish();
}

void LayerProgress::seal() {
  std::lock_guard lock(mutex_);
  is_sealed_ = true;
  publish();
}

void LayerProgress::finish() {
  std::lock_guard lock(mutex_);
  is_finished_ = true;
  publish();
}

void LayerProgress::publish() {
  if (!is_sealed_ && !is_finished_) return;
  int ready = layers_;
  if (!is_finished_) {
    for (const auto& [job, done] : done_) ready = std::min(ready, done);
  }
  if (ready <= ready_) return;
  ready_ = ready;
  if (gate_ != nullptr) gate_->advance(static_cast<uint32_t>(ready_));
  news_.notify_all();
}

bool LayerProgress::wait(int layers, double timeout_s) {
  std::unique_lock lock(mutex_);
  return news_.wait_until(lock, time_after(timeout_s), [&] { return ready_ >= layers; });
}

Status LayerProgress::wait_on(uint64_t stream, int layers) {
  std::shared_ptr<Gate> gate;
  {
    std::lock_guard lock(mutex_);
    if (device_ == nullptr) {
      return {Code::kUnavailable, "the transfer has no device; wait for it on the CPU"};
    }
    if (gate_ == nullptr) {
      if (Status status = device_->make_gate(&gate_); !status.ok()) return status;
      gate_->advance(static_cast<uint32_t>(ready_));
    }
    gate = gate_;
  }
  return gate->wait_on(stream, static_cast<uint32_t>(layers));
}

}  // namespace kvx
