#include "device/cuda_pinned.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "clock.h"
#include "device/cuda_device.h"
#include "kvx/memory.h"

namespace kvx {

PinnedPieces::PinnedPieces(CudaContext& context, uint64_t base, int64_t bytes, int64_t piece_bytes)
    : context_(context),
      base_(base),
      bytes_(static_cast<uint64_t>(bytes)),
      piece_bytes_(static_cast<uint64_t>(piece_bytes)),
      states_((bytes_ + piece_bytes_ - 1) / piece_bytes_),
      untried_(states_.size()) {}

uint64_t PinnedPieces::size_of(size_t piece) const {
  return std::min(piece_bytes_, bytes_ - piece * piece_bytes_);
}

Status PinnedPieces::call_driver(size_t piece) {
  return context_.call("cuMemHostRegister of " + std::to_string(size_of(piece)) + " bytes", [&] {
    return context_.api().host_register(reinterpret_cast<void*>(start_of(piece)), size_of(piece),
                                        cuda::kHostRegisterPortable);
  });
}

bool PinnedPieces::ensure_piece(size_t piece) {
  std::atomic<State>& state = states_[piece];
  if (state.load(std::memory_order_acquire) == State::kRegistered) return true;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return state.load() != State::kRegistering; });
  if (state.load() != State::kNone) return state.load() == State::kRegistered;
  state.store(State::kRegistering);
  lock.unlock();
  Status status = call_driver(piece);
  lock.lock();
  if (status.ok()) {
    pinned_bytes_.fetch_add(static_cast<int64_t>(size_of(piece)), std::memory_order_relaxed);
  } else if (refusal_.ok()) {
    refusal_ = std::move(status);
  }
  const bool is_registered = status.ok();
  state.store(is_registered ? State::kRegistered : State::kFailed, std::memory_order_release);
  --untried_;
  changed_.notify_all();
  return is_registered;
}

bool PinnedPieces::ensure(uint64_t address, uint64_t bytes) {
  const size_t first = (address - base_) / piece_bytes_;
  const size_t last = (address - base_ + bytes - 1) / piece_bytes_;
  bool are_all = true;
  for (size_t piece = first; piece <= last; ++piece) are_all &= ensure_piece(piece);
  return are_all;
}

void PinnedPieces::register_all() {
  for (size_t piece = 0; piece < states_.size() && !is_stopped_.load(); ++piece) {
    (void)ensure_piece(piece);
  }
}

Status PinnedPieces::wait(double timeout_s, bool* is_done) {
  std::unique_lock lock(mutex_);
  *is_done = changed_.wait_until(lock, time_after(timeout_s), [this] { return untried_ == 0; });
  return *is_done ? refusal_ : Status::Ok();
}

void PinnedPieces::unregister_all() {
  for (size_t piece = 0; piece < states_.size(); ++piece) {
    if (states_[piece].exchange(State::kFailed) != State::kRegistered) continue;
    context_.release("cuMemHostUnregister", [&] {
      return context_.api().host_unregister(reinterpret_cast<void*>(start_of(piece)));
    });
  }
}

size_t PinnedView::find(uint64_t address) const {
  const auto after = std::upper_bound(
      spans.begin(), spans.end(), address,
      [](uint64_t value, const CopyLimits::PinnedSpan& span) { return value < span.base; });
  if (after == spans.begin()) return spans.size();
  const auto found = std::prev(after);
  if (address - found->base >= found->bytes) return spans.size();
  return static_cast<size_t>(found - spans.begin());
}

bool PinnedView::ensure(uint64_t address, uint64_t bytes) const {
  const size_t at = find(address);
  if (at == spans.size() || address + bytes > ranges[at]->end()) return false;
  return ranges[at]->ensure(address, bytes);
}

uint64_t PinnedView::piece_end(uint64_t address) const {
  const size_t at = find(address);
  if (at == spans.size()) return 0;
  const CopyLimits::PinnedSpan& span = spans[at];
  const uint64_t piece = (address - span.base) / span.piece_bytes;
  return std::min(span.base + (piece + 1) * span.piece_bytes, span.base + span.bytes);
}

Status PinnedRegistry::add(std::shared_ptr<PinnedPieces> pieces) {
  std::lock_guard lock(mutex_);
  auto made = std::make_shared<PinnedView>(*view_);
  const auto after =
      std::upper_bound(made->ranges.begin(), made->ranges.end(), pieces->base(),
                       [](uint64_t base, const auto& range) { return base < range->base(); });
  const bool overlaps_next = after != made->ranges.end() && (*after)->base() < pieces->end();
  if (overlaps_next ||
      (after != made->ranges.begin() && (*std::prev(after))->end() > pieces->base())) {
    return {Code::kUsage, "part of this memory is pinned already"};
  }
  const auto at = after - made->ranges.begin();
  made->spans.insert(made->spans.begin() + at,
                     {pieces->base(), pieces->end() - pieces->base(), pieces->piece_bytes()});
  made->ranges.insert(after, std::move(pieces));
  view_ = std::move(made);
  return Status::Ok();
}

void PinnedRegistry::remove(const PinnedPieces* pieces) {
  std::lock_guard lock(mutex_);
  auto made = std::make_shared<PinnedView>(*view_);
  for (size_t i = 0; i < made->ranges.size(); ++i) {
    if (made->ranges[i].get() != pieces) continue;
    made->spans.erase(made->spans.begin() + static_cast<std::ptrdiff_t>(i));
    made->ranges.erase(made->ranges.begin() + static_cast<std::ptrdiff_t>(i));
    break;
  }
  view_ = std::move(made);
}

std::shared_ptr<const PinnedView> PinnedRegistry::view() const {
  std::lock_guard lock(mutex_);
  return view_;
}

namespace {

class CudaPinnedRange final : public PinnedRange {
 public:
  CudaPinnedRange(std::shared_ptr<CudaDevice> device, std::shared_ptr<PinnedPieces> pieces)
      : device_(std::move(device)), pieces_(std::move(pieces)) {}

  ~CudaPinnedRange() override {
    pieces_->stop();
    if (thread_.joinable()) thread_.join();
    device_->pinned().remove(pieces_.get());
    pieces_->unregister_all();
  }

  void start() {
    thread_ = std::thread([pieces = pieces_.get()] { pieces->register_all(); });
  }

  uint8_t* base() const override { return reinterpret_cast<uint8_t*>(pieces_->base()); }
  int64_t bytes() const override { return static_cast<int64_t>(pieces_->end() - pieces_->base()); }
  int64_t pinned_bytes() const override { return pieces_->pinned_bytes(); }
  Status wait(double timeout_s, bool* is_done) override {
    return pieces_->wait(timeout_s, is_done);
  }

 private:
  const std::shared_ptr<CudaDevice> device_;
  const std::shared_ptr<PinnedPieces> pieces_;
  std::thread thread_;
};

}  // namespace

Status CudaDevice::pin(uint8_t* base, int64_t bytes, std::unique_ptr<PinnedRange>* range) {
  return pin_in_pieces(base, bytes, kPinnedPieceBytes, range);
}

Status CudaDevice::pin_in_pieces(uint8_t* base, int64_t bytes, int64_t piece_bytes,
                                 std::unique_ptr<PinnedRange>* range) {
  const auto address = reinterpret_cast<uint64_t>(base);
  if (base == nullptr || bytes <= 0 || address % kAlignment != 0) {
    return {Code::kUsage, "pinned memory begins at a multiple of " + std::to_string(kAlignment) +
                              " and has bytes > 0"};
  }
  if (piece_bytes <= 0 || piece_bytes % kAlignment != 0) {
    return {Code::kUsage, "pieces have a multiple of " + std::to_string(kAlignment) + " bytes"};
  }
  auto pieces = std::make_shared<PinnedPieces>(*context_, address, bytes, piece_bytes);
  if (Status status = pinned_.add(pieces); !status.ok()) return status;
  auto made = std::make_unique<CudaPinnedRange>(shared_from_this(), std::move(pieces));
  try {
    made->start();
  } catch (const std::system_error& error) {
    return {Code::kUnavailable, std::string("cannot start a pinning thread: ") + error.what(),
            error.code().value()};
  }
  *range = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
