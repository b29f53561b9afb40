// The backend that works everywhere: threads that call pread, pwrite and fdatasync.
//
// A thread inside the kernel cannot be called back, so everything the threads touch lives in a
// shared Pool: close() leaves stuck threads behind, detached, with their Pool.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "backends/backends.h"
#include "backends/sink_gate.h"

namespace kvx {

namespace {

struct Worker {
  bool is_busy = false;                   // Pool::mutex
  uint64_t token = 0;                     // Pool::mutex
  std::atomic<bool> is_cancelled{false};  // read between two calls into the kernel
};

struct Pool {
  Pool(IoSink sink, int threads) : gate(std::move(sink)), workers(static_cast<size_t>(threads)) {}

  SinkGate gate;
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable news;
  std::deque<IoRequest> queue;
  std::vector<IoCompletion> given_up;  // never started; the courier delivers them
  std::vector<Worker> workers;
  bool is_closing = false;
  bool is_closed = false;
};

int64_t call_kernel(const IoRequest& request, int64_t done) {
  const auto bytes = static_cast<size_t>(std::min(request.bytes - done, kIoChunkBytes));
  if (request.kind == IoKind::kRead) {
    return pread(request.fd, request.buffer + done, bytes, request.offset + done);
  }
  return pwrite(request.fd, request.buffer + done, bytes, request.offset + done);
}

IoCompletion transfer(const IoRequest& request, const std::atomic<bool>& is_cancelled) {
  if (request.bytes < 0 || request.offset < 0) return {request.token, Code::kUsage, 0};
  int64_t done = 0;
  int retries = 0;
  while (done < request.bytes) {
    if (is_cancelled.load(std::memory_order_relaxed)) return {request.token, Code::kCancelled, 0};
    const int64_t moved = call_kernel(request, done);
    if (moved > 0) {
      done += moved;
      continue;
    }
    if (moved == 0) return {request.token, Code::kShort, 0};
    const int error = errno;
    if (error == EINTR) continue;
    if (error == EAGAIN && ++retries < kIoRetriesMax) continue;
    // O_DIRECT: the file ends inside a sector, so its end cannot be the start of the next read.
    if (error == EINVAL && done > 0 && request.kind == IoKind::kRead) {
      return {request.token, Code::kShort, 0};
    }
    return {request.token, Code::kStorage, error};
  }
  return {request.token, Code::kOk, 0};
}

IoCompletion sync(const IoRequest& request) {
  while (fdatasync(request.fd) != 0) {
    if (errno != EINTR) return {request.token, Code::kStorage, errno};
  }
  return {request.token, Code::kOk, 0};
}

void run_worker(const std::shared_ptr<Pool>& pool, Worker& self) {
  std::unique_lock lock(pool->mutex);
  while (true) {
    pool->work.wait(lock, [&] { return !pool->queue.empty() || pool->is_closing; });
    if (pool->queue.empty()) return;
    const IoRequest request = pool->queue.front();
    pool->queue.pop_front();
    self.is_busy = true;
    self.token = request.token;
    self.is_cancelled.store(false, std::memory_order_relaxed);
    lock.unlock();
    const IoCompletion completion =
        request.kind == IoKind::kSync ? sync(request) : transfer(request, self.is_cancelled);
    lock.lock();
    self.is_busy = false;
    lock.unlock();
    pool->gate.deliver({&completion, 1});
    lock.lock();
  }
}

// Delivers what was cancelled in the queue, also while every worker is stuck.
void run_courier(const std::shared_ptr<Pool>& pool) {
  std::unique_lock lock(pool->mutex);
  std::vector<IoCompletion> completions;
  while (true) {
    pool->news.wait(lock, [&] { return !pool->given_up.empty() || pool->is_closed; });
    if (pool->given_up.empty()) return;
    completions.swap(pool->given_up);
    lock.unlock();
    pool->gate.deliver(completions);
    completions.clear();
    lock.lock();
  }
}

class PosixBackend final : public IoBackend {
 public:
  PosixBackend(int threads, IoSink sink)
      : pool_(std::make_shared<Pool>(std::move(sink), threads)) {}
  ~PosixBackend() override { (void)close(0.0); }

  void start() {
    courier_ = std::thread([pool = pool_] { run_courier(pool); });
    for (Worker& worker : pool_->workers) {
      threads_.emplace_back([pool = pool_, &worker] { run_worker(pool, worker); });
    }
  }

  std::string_view name() const override { return "posix"; }

  Status register_buffer(uint8_t*, int64_t) override {
    return {Code::kUnavailable, "the posix backend does not register buffers"};
  }
  void unregister_buffer(uint8_t*) override {}

  void submit(std::span<const IoRequest> requests) override {
    {
      std::lock_guard lock(pool_->mutex);
      if (!pool_->is_closed) {
        pool_->gate.expect(requests.size());
        for (const IoRequest& request : requests) {
          if (pool_->is_closing) {
            pool_->given_up.push_back({request.token, Code::kCancelled, 0});
          } else {
            pool_->queue.push_back(request);
          }
        }
        if (pool_->is_closing) {
          pool_->news.notify_one();
        } else if (requests.size() == 1) {
          pool_->work.notify_one();
        } else {
          pool_->work.notify_all();
        }
        return;
      }
    }
    pool_->gate.refuse(requests);
  }

  void cancel(uint64_t token) override {
    std::lock_guard lock(pool_->mutex);
    const auto queued = std::find_if(pool_->queue.begin(), pool_->queue.end(),
                                     [&](const IoRequest& r) { return r.token == token; });
    if (queued != pool_->queue.end()) {
      pool_->queue.erase(queued);
      pool_->given_up.push_back({token, Code::kCancelled, 0});
      pool_->news.notify_one();
      return;
    }
    for (Worker& worker : pool_->workers) {
      if (worker.is_busy && worker.token == token) worker.is_cancelled = true;
    }
  }

  int64_t close(double timeout_s) override {
    if (is_closed_) return 0;
    is_closed_ = true;
    const auto deadline = deadline_after(timeout_s);
    {
      std::lock_guard lock(pool_->mutex);
      pool_->is_closing = true;
      for (const IoRequest& request : pool_->queue) {
        pool_->given_up.push_back({request.token, Code::kCancelled, 0});
      }
      pool_->queue.clear();
      for (Worker& worker : pool_->workers) worker.is_cancelled = true;
    }
    pool_->work.notify_all();
    pool_->news.notify_all();
    const bool is_drained = pool_->gate.wait_drained(deadline);
    {
      std::lock_guard lock(pool_->mutex);
      pool_->is_closed = true;
    }
    pool_->news.notify_all();
    if (courier_.joinable()) courier_.join();
    for (std::thread& thread : threads_) is_drained ? thread.join() : thread.detach();
    threads_.clear();
    return pool_->gate.shut();
  }

 private:
  const std::shared_ptr<Pool> pool_;
  std::thread courier_;
  std::vector<std::thread> threads_;
  bool is_closed_ = false;
};

}  // namespace

Status make_posix(int threads, IoSink sink, std::unique_ptr<IoBackend>* backend) {
  if (threads < 1 || threads > 1024) return {Code::kUsage, "threads must be in 1..1024"};
  auto posix = std::make_unique<PosixBackend>(threads, std::move(sink));
  try {
    posix->start();
  } catch (const std::system_error& error) {
    return {Code::kUnavailable, std::string("cannot start an I/O thread: ") + error.what(),
            error.code().value()};
  }
  *backend = std::move(posix);
  return Status::Ok();
}

}  // namespace kvx
