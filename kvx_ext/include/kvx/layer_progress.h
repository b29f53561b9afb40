// How many leading layers of one transfer have arrived, counted over all the jobs that bring them.
//
// Jobs join before they begin, tell how far they are, and the transfer seals it when no more will
// join: from then on the layers that every job has brought are ready. A thread waits for a layer
// with wait(), a stream of the device with wait_on(), where no CPU is involved any more. A job that
// ends early counts as done, so nobody waits for ever: whether the bytes are right is said by its
// results, not here.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "kvx/device.h"
#include "kvx/status.h"

namespace kvx {

// Thread-safe.
class LayerProgress {
 public:
  // A transfer without layers has one.
  LayerProgress(int layers, std::shared_ptr<Device> device)
      : layers_(layers), device_(std::move(device)) {}

  int layers() const { return layers_; }
  int ready() const;

  void join(uint64_t job);
  void advance(uint64_t job, int layers_done);  // never goes back
  void seal();
  // The transfer is over: everything is as ready as it will ever be.
  void finish();

  // False when time was up first.
  bool wait(int layers, double timeout_s);
  // Makes `stream` wait until `layers` are ready. See Gate::wait_on().
  Status wait_on(uint64_t stream, int layers);

 private:
  void publish();  // REQUIRES: mutex_

  const int layers_;
  const std::shared_ptr<Device> device_;
  mutable std::mutex mutex_;
  std::condition_variable news_;
  std::unordered_map<uint64_t, int> done_;  // mutex_
  std::shared_ptr<Gate> gate_;              // mutex_; made when first asked for
  int ready_ = 0;                           // mutex_
  bool is_sealed_ = false;                  // mutex_
  bool is_finished_ = false;                // mutex_
};

}  // namespace kvx
