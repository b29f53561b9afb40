// The contract of backend.h, held against every real backend, plain and inside every decorator.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "backends_fixture.h"
#include "backends_sandbox.h"

namespace {

using namespace backends_test;

// ---- Every variant --------------------------------------------------------------------------

void test_round_trip(const Variant& variant, bool wants_direct) {
  Fixture fixture(variant);
  File file(wants_direct);
  constexpr int64_t kBytes = (9 << 20) + 8 * kKiB;  // several chunks and an odd end
  Buffer written(kBytes), read(kBytes);
  written.fill(1);
  CHECK(fixture.run(IoKind::kWrite, file, written.data, kBytes, 4096) == Code::kOk);
  CHECK(fixture.run(IoKind::kSync, file, nullptr, 0, 0) == Code::kOk);
  CHECK(fixture.run(IoKind::kRead, file, read.data, kBytes, 4096) == Code::kOk);
  CHECK(std::memcmp(written.data, read.data, kBytes) == 0);
  const std::vector<uint8_t> content = file.content();
  CHECK(std::memcmp(content.data() + 4096, written.data, kBytes) == 0);

  if (!file.is_direct) {
    std::memset(read.data, 0, 4096);
    CHECK(fixture.run(IoKind::kWrite, file, written.data + 3, 777, 4099) == Code::kOk);
    CHECK(fixture.run(IoKind::kRead, file, read.data + 1, 775, 4100) == Code::kOk);
    CHECK(std::memcmp(written.data + 4, read.data + 1, 775) == 0);
  }
}

void test_edges(const Variant& variant, bool wants_direct) {
  Fixture fixture(variant);
  File file(wants_direct);
  Buffer buffer(64 * kKiB);
  buffer.fill(2);
  CHECK(fixture.run(IoKind::kWrite, file, buffer.data, 16 * kKiB, 0) == Code::kOk);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 32 * kKiB, 0) == Code::kShort);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 4 * kKiB, 16 * kKiB) == Code::kShort);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 4 * kKiB, 1 << 20) == Code::kShort);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 16 * kKiB, 0) == Code::kOk);
  CHECK(ftruncate(file.fd, 5000) == 0);  // the end lies inside a sector
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 16 * kKiB, 0) == Code::kShort);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 0, 0) == Code::kOk);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, -1, 0) == Code::kUsage);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 512, -512) == Code::kUsage);

  const IoRequest bad = {IoKind::kWrite, -1, buffer.data, 4096, 0, 77};
  fixture.backend->submit({&bad, 1});
  const IoCompletion completion = fixture.sink.wait(77);
  CHECK(completion.code == Code::kStorage && completion.error_number == EBADF);
  fixture.backend->cancel(123456);  // unknown: ignored
}

void test_many(const Variant& variant) {
  Fixture fixture(variant);
  File file(true);
  constexpr int64_t kBlock = 16 * kKiB;
  constexpr int64_t kBlocks = 300;  // many times the queue depth
  Buffer written(kBlock * kBlocks), read(kBlock * kBlocks);
  written.fill(3);
  for (const IoKind kind : {IoKind::kWrite, IoKind::kRead}) {
    std::vector<IoRequest> requests;
    uint8_t* base = kind == IoKind::kWrite ? written.data : read.data;
    for (int64_t i = 0; i < kBlocks; ++i) {
      requests.push_back({kind, file.fd, base + i * kBlock, kBlock, (kBlocks - 1 - i) * kBlock,
                          fixture.next_token++});
    }
    const size_t before = fixture.sink.count();
    fixture.backend->submit(requests);
    fixture.sink.wait_count(before + requests.size());
    for (const IoRequest& request : requests) {
      CHECK(fixture.sink.wait(request.token).code == Code::kOk);
    }
  }
  CHECK(std::memcmp(written.data, read.data, static_cast<size_t>(written.bytes)) == 0);
}

void test_threads(const Variant& variant) {
  Fixture fixture(variant);
  File file(false);
  constexpr uint64_t kEach = 100;
  constexpr int64_t kBlock = 4 * kKiB;
  std::vector<std::thread> threads;
  Buffer buffer(4 * kEach * kBlock);
  buffer.fill(4);
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < kEach; ++i) {
        const auto block = static_cast<int64_t>(t * kEach + i);
        const IoRequest request = {IoKind::kWrite, file.fd,        buffer.data + block * kBlock,
                                   kBlock,         block * kBlock, 1000 + t * kEach + i};
        fixture.backend->submit({&request, 1});
        if (i % 7 == 0) fixture.backend->cancel(request.token);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  fixture.sink.wait_count(4 * kEach);
  const std::vector<uint8_t> content = file.content();
  for (uint64_t i = 0; i < 4 * kEach; ++i) {
    const Code code = fixture.sink.wait(1000 + i).code;
    CHECK(code == Code::kOk || code == Code::kCancelled);
    if (code != Code::kOk) continue;
    CHECK(std::memcmp(content.data() + i * kBlock, buffer.data + i * kBlock, kBlock) == 0);
  }
}

void test_registered(const Variant& variant) {
  Fixture fixture(variant);
  File file(true);
  Buffer buffer(8 << 20), outside(1 << 20);
  buffer.fill(5);
  const kvx::Status status = fixture.backend->register_buffer(buffer.data, 4 << 20);
  CHECK(status.ok() == (fixture.backend->name() == "io_uring"));
  if (status.ok()) {
    CHECK(fixture.backend->register_buffer(buffer.data + 4096, 4096).code() == Code::kUsage);
  }
  CHECK(fixture.backend->register_buffer(buffer.data, 0).code() != Code::kOk);
  // Inside, straddling the end, and outside of what is registered.
  for (const int64_t start : {int64_t{0}, (int64_t{4} << 20) - 8 * kKiB, int64_t{6} << 20}) {
    CHECK(fixture.run(IoKind::kWrite, file, buffer.data + start, 1 << 20, start) == Code::kOk);
    CHECK(fixture.run(IoKind::kRead, file, outside.data, 1 << 20, start) == Code::kOk);
    CHECK(std::memcmp(buffer.data + start, outside.data, 1 << 20) == 0);
  }
  fixture.backend->unregister_buffer(buffer.data);
  fixture.backend->unregister_buffer(buffer.data);  // unknown: ignored
  // New pages at the same address: a stale registration would write the old ones.
  CHECK(mmap(buffer.data, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
             -1, 0) == buffer.data);
  buffer.fill(6);
  CHECK(fixture.run(IoKind::kWrite, file, buffer.data, 1 << 20, 0) == Code::kOk);
  CHECK(fixture.run(IoKind::kRead, file, outside.data, 1 << 20, 0) == Code::kOk);
  CHECK(std::memcmp(buffer.data, outside.data, 1 << 20) == 0);
  CHECK(fixture.backend->register_buffer(buffer.data, 4 << 20).ok() == status.ok());
}

void test_submit_in_sink_and_after_close(const Variant& variant) {
  File file(false);
  Buffer buffer(4096);
  Sink sink;
  std::unique_ptr<kvx::IoBackend> backend;
  kvx::BackendOptions options;
  if (variant.is_faulty) options.failpoints = std::make_shared<kvx::Failpoints>();
  const auto chain = [&](std::span<const IoCompletion> done) {
    for (const IoCompletion& completion : done) {
      if (completion.token >= 50 || completion.code != Code::kOk) continue;
      const IoRequest next = {IoKind::kWrite, file.fd, buffer.data, 4096, 0, completion.token + 1};
      backend->submit({&next, 1});
      backend->cancel(999);
    }
    sink(done);
  };
  CHECK(kvx::make_backend(variant.kind, options, chain, &backend, nullptr).ok());
  const IoRequest first = {IoKind::kWrite, file.fd, buffer.data, 4096, 0, 1};
  backend->submit({&first, 1});
  sink.wait_count(50);
  CHECK(backend->close(kPatience_s) == 0);
  const IoRequest late = {IoKind::kWrite, file.fd, buffer.data, 4096, 0, 100};
  backend->submit({&late, 1});
  CHECK(sink.has(100) && sink.wait(100).code == Code::kCancelled);
  backend->cancel(100);
  CHECK(backend->close(1.0) == 0);
}

void test_close_under_load(const Variant& variant) {
  File file(true);
  Buffer buffer(1 << 20);
  Sink sink;
  constexpr uint64_t kRequests = 600;
  {
    kvx::BackendOptions options;
    options.queue_depth = 4;
    if (variant.is_faulty) options.failpoints = std::make_shared<kvx::Failpoints>();
    std::unique_ptr<kvx::IoBackend> backend;
    const auto forward = [&](std::span<const IoCompletion> done) { sink(done); };
    CHECK(kvx::make_backend(variant.kind, options, forward, &backend, nullptr).ok());
    const auto submit = [&](uint64_t first, uint64_t last) {
      for (uint64_t i = first; i < last; ++i) {
        const IoRequest request = {IoKind::kWrite, file.fd, buffer.data, buffer.bytes, 0, i};
        backend->submit({&request, 1});
      }
    };
    submit(0, kRequests / 2);
    std::thread submitter([&] { submit(kRequests / 2, kRequests); });
    CHECK(backend->close(kPatience_s) == 0);
    submitter.join();
  }
  sink.wait_count(kRequests);
  uint64_t cancelled = 0;
  for (uint64_t i = 0; i < kRequests; ++i) {
    const Code code = sink.wait(i).code;
    CHECK(code == Code::kOk || code == Code::kCancelled);
    cancelled += code == Code::kCancelled ? 1 : 0;
  }
  CHECK(cancelled > kRequests / 2);
}

// A read of an empty pipe sleeps in the kernel, but lets itself be called back.
void test_cancel_in_kernel(const Variant& variant) {
  if (variant.kind != BackendKind::kUring) return;  // pread() has no offset in a pipe
  int ends[2];
  CHECK(pipe2(ends, O_CLOEXEC) == 0);
  {
    Buffer buffer(4096);
    Fixture fixture(variant);
    const IoRequest requests[] = {{IoKind::kRead, ends[0], buffer.data, 512, 0, 1},
                                  {IoKind::kRead, ends[0], buffer.data + 512, 512, 0, 2}};
    fixture.backend->submit(requests);
    fixture.backend->cancel(1);
    CHECK(fixture.sink.wait(1).code == Code::kCancelled);
    CHECK(!fixture.sink.has(2));
    const double start = now_s();
    CHECK(fixture.backend->close(kPatience_s) == 0);
    CHECK(now_s() - start < 5.0);
    CHECK(fixture.sink.wait(2).code == Code::kCancelled);
  }
  ::close(ends[0]);
  ::close(ends[1]);
}

// ---- Requests that the kernel keeps ---------------------------------------------------------

// Memory whose first touch waits in the kernel until release(): what a dying device does.
class StuckMemory {
 public:
  explicit StuckMemory(int64_t size) : buffer(size) {
    fd_ = static_cast<int>(syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    if (fd_ < 0) return;
    uffdio_api api = {UFFD_API, 0, 0};
    CHECK(ioctl(fd_, UFFDIO_API, &api) == 0);
    uffdio_register range = {};
    range.range = {reinterpret_cast<uint64_t>(buffer.data), static_cast<uint64_t>(size)};
    range.mode = UFFDIO_REGISTER_MODE_MISSING;
    CHECK(ioctl(fd_, UFFDIO_REGISTER, &range) == 0);
  }
  ~StuckMemory() { release(); }
  bool is_offered() const { return fd_ >= 0; }
  void wait_for_touch() const {
    uffd_msg message;
    while (read(fd_, &message, sizeof message) != sizeof message) std::this_thread::yield();
  }
  void release() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  Buffer buffer;

 private:
  int fd_ = -1;
};

void test_stuck_in_kernel(const Variant& variant) {
  StuckMemory memory(1 << 20);
  if (!memory.is_offered()) {
    std::printf("  skipped, userfaultfd is not allowed here: %s\n", std::strerror(errno));
    return;
  }
  File file(false);
  Buffer buffer(1 << 20);
  Fixture fixture(variant);
  CHECK(fixture.run(IoKind::kWrite, file, buffer.data, 1 << 20, 0) == Code::kOk);
  const uint64_t stuck = fixture.submit(IoKind::kRead, file, memory.buffer.data, 1 << 20, 0);
  memory.wait_for_touch();
  const double start = now_s();
  const int64_t abandoned = fixture.backend->close(0.3);
  CHECK(now_s() - start < 5.0);
  // io_uring may get it out of the page fault (its own threads can be signalled).
  CHECK(abandoned == (fixture.sink.has(stuck) ? 0 : 1));
  std::printf("  abandoned in the kernel: %d\n", static_cast<int>(abandoned));
  const size_t told = fixture.sink.count();
  memory.release();
  // The backend's own state lives until the kernel is done; the buffer must, too.
  for (int i = 0; i < 50; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  CHECK(fixture.sink.count() == told);
}

// ---- Files and fallbacks --------------------------------------------------------------------

void test_files() {
  int fd = -1;
  bool is_direct = false;
  File file(true);
  CHECK(kvx::open_file(file.path, {.create = true, .exclusive = true}, &fd, &is_direct)
            .error_number() == EEXIST);
  CHECK(kvx::open_file("kvx_no_such_file", {}, &fd, &is_direct).error_number() == ENOENT);
  // procfs refuses O_DIRECT.
  CHECK(kvx::open_file("/proc/self/comm", {.direct = true}, &fd, &is_direct).ok() && !is_direct);
  ::close(fd);
  CHECK(kvx::preallocate(file.fd, 0, 1 << 20).ok() && file.content().size() == 1 << 20);
  CHECK(kvx::preallocate(file.fd, 0, int64_t{1} << 43).error_number() != 0);
  CHECK(file.content().size() == 1 << 20);
}

}  // namespace

int main() {
  sandbox::test_all();  // forks, so before any thread starts
  test_files();
  for_each_variant([](const Variant& variant) {
    for (const bool wants_direct : {false, true}) {
      test_round_trip(variant, wants_direct);
      test_edges(variant, wants_direct);
    }
    test_many(variant);
    test_threads(variant);
    test_registered(variant);
    test_submit_in_sink_and_after_close(variant);
    test_close_under_load(variant);
    test_cancel_in_kernel(variant);
    test_stuck_in_kernel(variant);
  });
  std::puts("ok");
  return 0;
}
