#include "device/cuda_gate.h"

#include <atomic>
#include <utility>

#include "device/cuda_device.h"

namespace kvx {

namespace {

// Every event has passed. Asking an event of a dead context returns its error: passed as well.
bool has_passed(const cuda::Api& api, const GateWord& word) {
  if (word.is_untraceable) return false;
  for (const auto& [stream, event] : word.waits) {
    if (api.event_query(event.get()) == cuda::kErrorNotReady) return false;
  }
  return true;
}

class CudaGate final : public Gate {
 public:
  CudaGate(std::shared_ptr<CudaDevice> device, GateWord word)
      : device_(std::move(device)), word_(std::move(word)) {}
  ~CudaGate() override { device_->gate_words().give_back(std::move(word_)); }

  void advance(uint32_t value) override {
    std::atomic_ref<uint32_t> word(*word_.host);
    uint32_t seen = word.load(std::memory_order_relaxed);
    while (seen < value) {
      device_->note_host_access(word_.host, sizeof(value), true);
      if (word.compare_exchange_weak(seen, value, std::memory_order_release)) return;
    }
  }

  uint32_t value() const override {
    return std::atomic_ref<uint32_t>(*word_.host).load(std::memory_order_acquire);
  }

  Status wait_on(uint64_t stream, uint32_t value) override {
    const cuda::Api& api = device_->api();
    if (api.stream_wait_value == nullptr) {
      return {Code::kUnavailable, "this driver's streams cannot wait for a word of memory"};
    }
    if (Status status = check_stream(stream); !status.ok()) return status;
    const auto waiting = reinterpret_cast<cuda::Stream>(stream);
    std::lock_guard lock(mutex_);
    return device_->context().call("cuStreamWaitValue32", [&] { return enqueue(waiting, value); });
  }

 private:
  cuda::Result enqueue(cuda::Stream stream, uint32_t value) {
    const cuda::Api& api = device_->api();
    PooledEvent& event = word_.waits[stream];
    if (!event) {
      const cuda::Result result = device_->events().take(&event);
      if (result != cuda::kSuccess) {
        word_.waits.erase(stream);
        return result;
      }
    }
    const cuda::Result result =
        api.stream_wait_value(stream, word_.device, value, cuda::kWaitValueGeq);
    if (result != cuda::kSuccess) return result;
    // The wait stands whether or not its end can be noticed.
    if (device_->context().note(api.event_record(event.get(), stream)) != cuda::kSuccess) {
      word_.is_untraceable = true;
    }
    return cuda::kSuccess;
  }

  const std::shared_ptr<CudaDevice> device_;
  std::mutex mutex_;
  GateWord word_;  // waits: mutex_
};

}  // namespace

GateWords::~GateWords() {
  for (const auto& block : blocks_) {
    context_.release("cuMemHostUnregister",
                     [&] { return context_.api().host_unregister(block->data()); });
  }
}

Status GateWords::add_block() {
  std::unique_ptr<HostRegion> block;
  Status status = HostRegion::create(kBlockBytes, RegionKind::kAnonymous, -1, &block);
  if (!status.ok()) return status;
  const cuda::Api& api = context_.api();
  status =
      context_.check("cuMemHostRegister of the gates",
                     api.host_register(block->data(), kBlockBytes, cuda::kHostRegisterPortable));
  if (!status.ok()) return status;
  blocks_.push_back(std::move(block));
  uint8_t* const data = blocks_.back()->data();
  cuda::DevicePointer device = 0;
  status = context_.check("cuMemHostGetDevicePointer", api.host_device_pointer(&device, data, 0));
  if (!status.ok()) return status;
  for (int64_t at = kBlockBytes - kWordBytes; at >= 0; at -= kWordBytes) {
    GateWord word;
    word.host = reinterpret_cast<uint32_t*>(data + at);
    word.device = device + static_cast<uint64_t>(at);
    idle_.push_back(std::move(word));
  }
  return Status::Ok();
}

void GateWords::collect() {
  for (size_t i = 0; i < awaited_.size();) {
    if (!has_passed(context_.api(), awaited_[i])) {
      ++i;
      continue;
    }
    awaited_[i].waits.clear();
    idle_.push_back(std::move(awaited_[i]));
    awaited_[i] = std::move(awaited_.back());
    awaited_.pop_back();
  }
}

Status GateWords::take(GateWord* word) {
  std::lock_guard lock(mutex_);
  if (idle_.empty()) collect();
  if (idle_.empty()) {
    if (Status status = add_block(); !status.ok()) return status;
  }
  *word = std::move(idle_.back());
  idle_.pop_back();
  std::atomic_ref<uint32_t>(*word->host).store(0, std::memory_order_release);
  return Status::Ok();
}

void GateWords::give_back(GateWord word) noexcept {
  std::lock_guard lock(mutex_);
  (word.waits.empty() && !word.is_untraceable ? idle_ : awaited_).push_back(std::move(word));
}

Status CudaDevice::make_gate(std::shared_ptr<Gate>* gate) {
  const ContextScope scope(*context_);
  if (scope.result() != cuda::kSuccess) return context_->check("cuCtxPushCurrent", scope.result());
  GateWord word;
  if (Status status = gate_words_.take(&word); !status.ok()) return status;
  *gate = std::make_shared<CudaGate>(shared_from_this(), std::move(word));
  return Status::Ok();
}

}  // namespace kvx
