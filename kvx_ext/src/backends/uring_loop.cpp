#include "backends/uring_loop.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>

#include "backends/backends.h"

namespace kvx {

namespace {

// Values of user_data that are no flight.
constexpr uint64_t kWakeEvent = ~uint64_t{0};
constexpr uint64_t kCancelEvent = kWakeEvent - 1;

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace

UringLoop::UringLoop(std::unique_ptr<UringRing> ring, int wake_fd, int queue_depth, IoSink sink)
    : ring_(std::move(ring)),
      wake_fd_(wake_fd),
      gate_(std::move(sink)),
      buffers_(*ring_),
      flights_(static_cast<size_t>(queue_depth)) {
  for (size_t flight = flights_.size(); flight > 0; --flight) free_flights_.push_back(flight - 1);
}

UringLoop::~UringLoop() { ::close(wake_fd_); }

// ---- Any thread ----------------------------------------------------------------------------

bool UringLoop::has_mail() const {
  return !mail_.requests.empty() || !mail_.cancels.empty() || !mail_.changes.empty();
}

void UringLoop::wake() {
  if (!is_asleep_) return;
  is_asleep_ = false;
  const uint64_t one = 1;
  // Cannot fail: the counter would have to reach 2^64.
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
}

void UringLoop::submit(std::span<const IoRequest> requests) {
  {
    std::lock_guard lock(mail_mutex_);
    if (!is_closed_) {
      gate_.expect(requests.size());
      mail_.requests.insert(mail_.requests.end(), requests.begin(), requests.end());
      wake();
      return;
    }
  }
  gate_.refuse(requests);
}

void UringLoop::cancel(uint64_t token) {
  std::lock_guard lock(mail_mutex_);
  if (is_closing_) return;  // everything is being cancelled
  mail_.cancels.push_back(token);
  wake();
}

std::future<Status> UringLoop::change_buffer(uint8_t* base, int64_t bytes) {
  BufferChange change{base, bytes, {}};
  std::future<Status> result = change.result.get_future();
  std::lock_guard lock(mail_mutex_);
  if (is_closing_) {
    change.result.set_value({Code::kCancelled, "the backend is closed"});
  } else {
    mail_.changes.push_back(std::move(change));
    wake();
  }
  return result;
}

bool UringLoop::close(std::chrono::steady_clock::time_point deadline) {
  {
    std::lock_guard lock(mail_mutex_);
    is_closing_ = true;
    wake();
  }
  return gate_.wait_drained(deadline);
}

int64_t UringLoop::abandon() {
  std::vector<IoCompletion> unread;
  {
    std::lock_guard lock(mail_mutex_);
    is_closed_ = true;
    // The thread may be stuck in the kernel; what it has not seen is not in the kernel.
    for (const IoRequest& request : mail_.requests) {
      unread.push_back({request.token, Code::kCancelled, 0});
    }
    mail_.requests.clear();
  }
  gate_.deliver(unread);
  return gate_.shut();
}

// ---- The loop's thread ---------------------------------------------------------------------

void UringLoop::run() {
  if (Status status = ring_->enable(); !status.ok()) {
    // probe_io_uring() has enabled a ring of the same kind before, so this is not to be expected.
    std::lock_guard lock(mail_mutex_);
    is_closing_ = true;
  }
  while (true) {
    read_mail();
    launch();
    deliver();
    if (try_finish()) return;
    arm_wake();
    wait();
    // Before the mail is read: what the sink submits then goes out with the same system call.
    deliver();
  }
}

void UringLoop::deliver() {
  gate_.deliver(completions_);
  completions_.clear();
}

void UringLoop::read_mail() {
  bool is_closing = false;
  {
    std::lock_guard lock(mail_mutex_);
    is_asleep_ = false;
    std::swap(mail_.requests, taken_.requests);
    std::swap(mail_.cancels, taken_.cancels);
    std::swap(mail_.changes, taken_.changes);
    is_closing = is_closing_;
  }
  for (BufferChange& change : taken_.changes) {
    if (change.bytes == 0) {
      buffers_.remove(change.base);
      change.result.set_value(Status::Ok());
    } else {
      change.result.set_value(buffers_.add(change.base, change.bytes));
    }
  }
  for (const IoRequest& request : taken_.requests) accept(request);
  for (const uint64_t token : taken_.cancels) give_up(token);
  taken_.requests.clear();
  taken_.cancels.clear();
  taken_.changes.clear();
  if (is_closing) give_up_all();
}

bool UringLoop::try_finish() {
  if (!operations_.empty()) return false;
  std::lock_guard lock(mail_mutex_);
  if (!is_closing_ || has_mail()) return false;
  is_closed_ = true;
  return true;
}

void UringLoop::accept(const IoRequest& request) {
  const bool is_sync = request.kind == IoKind::kSync;
  if (!is_sync && (request.bytes < 0 || request.offset < 0)) {
    completions_.push_back({request.token, Code::kUsage, 0});
    return;
  }
  if (!is_sync && request.bytes == 0) {
    completions_.push_back({request.token, Code::kOk, 0});
    return;
  }
  const auto [found, is_new] = operations_.try_emplace(request.token);
  if (!is_new) {
    completions_.push_back({request.token, Code::kUsage, 0});
    return;
  }
  found->second.request = request;
  if (is_sync) found->second.request.bytes = 1;  // one flight, no cutting
  backlog_.push_back(&found->second);
}

void UringLoop::give_up(uint64_t token) {
  const auto found = operations_.find(token);
  if (found == operations_.end()) return;
  Operation& operation = found->second;
  if (operation.is_cancelled) return;
  operation.is_cancelled = true;
  if (operation.launched < operation.request.bytes) {
    operation.code = Code::kCancelled;
    std::erase(backlog_, &operation);
  }
  if (operation.flights == 0) {
    finish(operation);
    return;
  }
  for (size_t flight = 0; flight < flights_.size(); ++flight) {
    if (flights_[flight].operation == &operation) unsent_cancels_.push_back(flight);
  }
}

void UringLoop::give_up_all() {
  if (was_told_to_close_ && backlog_.empty()) return;
  was_told_to_close_ = true;
  std::vector<uint64_t> tokens;
  for (const auto& [token, operation] : operations_) tokens.push_back(token);
  for (const uint64_t token : tokens) give_up(token);
}

void UringLoop::launch() {
  while (!unissued_.empty()) {
    const size_t flight = unissued_.front();
    if (flights_[flight].operation->is_cancelled) {
      finish_flight(flight, Code::kCancelled, 0);
    } else if (!issue(flight)) {
      return;
    }
    unissued_.pop_front();
  }
  while (!unsent_cancels_.empty()) {
    io_uring_sqe* entry = ring_->prepare();
    if (entry == nullptr) return;
    entry->opcode = IORING_OP_ASYNC_CANCEL;
    entry->fd = -1;
    entry->addr = unsent_cancels_.back();
    entry->user_data = kCancelEvent;
    unsent_cancels_.pop_back();
  }
  while (!backlog_.empty() && !free_flights_.empty()) {
    Operation& operation = *backlog_.front();
    launch_chunk(operation);
    if (operation.launched == operation.request.bytes) backlog_.pop_front();
  }
}

void UringLoop::launch_chunk(Operation& operation) {
  const size_t index = free_flights_.back();
  free_flights_.pop_back();
  const int64_t left = operation.request.bytes - operation.launched;
  flights_[index] = {&operation, operation.launched, std::min(left, kIoChunkBytes), 0, 0};
  if (operation.request.kind != IoKind::kSync) {
    // A registered operation must lie inside one slot of the table.
    Flight& flight = flights_[index];
    flight.bytes = buffers_.find(operation.request.buffer + flight.offset, flight.bytes).bytes;
  }
  operation.launched += flights_[index].bytes;
  ++operation.flights;
  if (!issue(index)) unissued_.push_back(index);
}

// False when the submission ring is full.
bool UringLoop::issue(size_t index) {
  const Flight& flight = flights_[index];
  const IoRequest& request = flight.operation->request;
  io_uring_sqe* entry = ring_->prepare();
  if (entry == nullptr) return false;
  entry->fd = request.fd;
  entry->user_data = index;
  // Where the kernel would not wait for us it says EAGAIN; its own threads may wait.
  if (flight.retries > 0) entry->flags = IOSQE_ASYNC;
  if (request.kind == IoKind::kSync) {
    entry->opcode = IORING_OP_FSYNC;
    entry->fsync_flags = IORING_FSYNC_DATASYNC;
    return true;
  }
  uint8_t* start = request.buffer + flight.offset + flight.done;
  const int slot = buffers_.find(start, 1).slot;
  const bool is_read = request.kind == IoKind::kRead;
  if (slot >= 0) {
    entry->opcode = is_read ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
    entry->buf_index = static_cast<uint16_t>(slot);
  } else {
    entry->opcode = is_read ? IORING_OP_READ : IORING_OP_WRITE;
  }
  entry->addr = address(start);
  entry->len = static_cast<uint32_t>(flight.bytes - flight.done);
  entry->off = static_cast<uint64_t>(request.offset + flight.offset + flight.done);
  return true;
}

void UringLoop::arm_wake() {
  if (is_wake_armed_) return;
  io_uring_sqe* entry = ring_->prepare();
  if (entry == nullptr) return;  // the ring is full, so enter() does not sleep for long
  entry->opcode = IORING_OP_POLL_ADD;
  entry->fd = wake_fd_;
  entry->poll_events = POLLIN;
  entry->user_data = kWakeEvent;
  is_wake_armed_ = true;
}

void UringLoop::wait() {
  bool may_sleep = false;
  {
    std::lock_guard lock(mail_mutex_);
    const bool is_told = is_closing_ && !was_told_to_close_;
    may_sleep = is_wake_armed_ && !has_mail() && !is_told;
    is_asleep_ = may_sleep;
  }
  const int result = ring_->enter(may_sleep);
  std::array<io_uring_cqe, 128> events;
  size_t landed = 0;
  for (size_t ready = events.size(); ready == events.size(); landed += ready) {
    ready = ring_->reap(events);
    for (size_t i = 0; i < ready; ++i) land(events[i]);
  }
  // The kernel is short of memory (EAGAIN) or of completion slots (EBUSY, just made free).
  if (result < 0 && result != -EINTR && landed == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void UringLoop::land(const io_uring_cqe& event) {
  if (event.user_data == kCancelEvent) return;  // the flight itself tells how it ended
  if (event.user_data != kWakeEvent) {
    settle(event.user_data, event.res);
    return;
  }
  is_wake_armed_ = false;
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t bytes = read(wake_fd_, &count, sizeof count);
}

void UringLoop::settle(size_t index, int32_t result) {
  Flight& flight = flights_[index];
  const IoKind kind = flight.operation->request.kind;
  if (result > 0 && kind != IoKind::kSync) {
    flight.done += result;
    if (flight.done == flight.bytes) return finish_flight(index, Code::kOk, 0);
  } else if (result == 0) {
    return finish_flight(index, kind == IoKind::kSync ? Code::kOk : Code::kShort, 0);
  } else if (result == -EINVAL && flight.done > 0 && kind == IoKind::kRead) {
    // O_DIRECT: the file ends inside a sector, so its end cannot be the start of the next read.
    return finish_flight(index, Code::kShort, 0);
  } else if (result < 0) {
    // A cancelled request ends with ECANCELED, or with EINTR where it was already being worked on.
    const bool is_passing = result == -EINTR || result == -EAGAIN || result == -ECANCELED;
    if (!is_passing || ++flight.retries > kIoRetriesMax) {
      return finish_flight(index, Code::kStorage, -result);
    }
  }
  if (flight.operation->is_cancelled) return finish_flight(index, Code::kCancelled, 0);
  if (!issue(index)) unissued_.push_back(index);
}

void UringLoop::finish_flight(size_t index, Code code, int error_number) {
  Operation& operation = *flights_[index].operation;
  flights_[index].operation = nullptr;
  free_flights_.push_back(index);
  --operation.flights;
  // The first failure is the one to tell, but an error says more than the cancel it caused.
  if (operation.code == Code::kOk || (operation.code == Code::kCancelled && code != Code::kOk)) {
    operation.code = code;
    operation.error_number = error_number;
  }
  if (operation.code != Code::kOk && operation.launched < operation.request.bytes) {
    std::erase(backlog_, &operation);
    operation.launched = operation.request.bytes;
  }
  if (operation.flights == 0 && operation.launched == operation.request.bytes) finish(operation);
}

void UringLoop::finish(Operation& operation) {
  completions_.push_back({operation.request.token, operation.code, operation.error_number});
  operations_.erase(operation.request.token);
}

}  // namespace kvx
