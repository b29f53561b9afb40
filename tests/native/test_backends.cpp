// The contract of backend.h, held against every real backend, plain and inside every decorator.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backends_sandbox.h"
#include "check.h"
#include "kvx/backend_factory.h"

namespace {

using kvx::BackendKind;
using kvx::Code;
using kvx::FaultAction;
using kvx::FaultRule;
using kvx::FaultTarget;
using kvx::IoCompletion;
using kvx::IoKind;
using kvx::IoRequest;

constexpr int64_t kKiB = 1024;
constexpr double kPatience_s = 30.0;

// Collects completions, and fails when a request gets two.
class Sink {
 public:
  void operator()(std::span<const IoCompletion> completions) {
    std::lock_guard lock(mutex_);
    for (const IoCompletion& completion : completions) {
      CHECK(done_.emplace(completion.token, completion).second);
    }
    news_.notify_all();
  }

  size_t count() {
    std::lock_guard lock(mutex_);
    return done_.size();
  }

  bool has(uint64_t token) {
    std::lock_guard lock(mutex_);
    return done_.contains(token);
  }

  IoCompletion wait(uint64_t token) {
    std::unique_lock lock(mutex_);
    CHECK(news_.wait_for(lock, std::chrono::duration<double>(kPatience_s),
                         [&] { return done_.contains(token); }));
    return done_.at(token);
  }

  void wait_count(size_t count) {
    std::unique_lock lock(mutex_);
    CHECK(news_.wait_for(lock, std::chrono::duration<double>(kPatience_s),
                         [&] { return done_.size() >= count; }));
    CHECK(done_.size() == count);
  }

 private:
  std::mutex mutex_;
  std::condition_variable news_;
  std::map<uint64_t, IoCompletion> done_;
};

struct Buffer {
  explicit Buffer(int64_t size) : bytes(size) {
    data = static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(data != MAP_FAILED);
  }
  ~Buffer() { munmap(data, static_cast<size_t>(bytes)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void fill(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(random());
  }

  uint8_t* data;
  int64_t bytes;
};

class File {
 public:
  explicit File(bool wants_direct) {
    char name[] = "kvx_backends_XXXXXX";
    const int made = mkstemp(name);
    CHECK(made >= 0);
    ::close(made);
    path = name;
    CHECK(kvx::open_file(path, {.create = true, .direct = wants_direct}, &fd, &is_direct).ok());
  }
  ~File() {
    ::close(fd);
    unlink(path.c_str());
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::vector<uint8_t> content() const {
    struct stat facts = {};
    CHECK(fstat(fd, &facts) == 0);
    std::vector<uint8_t> bytes(static_cast<size_t>(facts.st_size));
    const int plain = open(path.c_str(), O_RDONLY);
    CHECK(pread(plain, bytes.data(), bytes.size(), 0) == facts.st_size);
    ::close(plain);
    return bytes;
  }

  std::string path;
  int fd = -1;
  bool is_direct = false;
};

struct Variant {
  BackendKind kind;
  bool is_faulty;  // with Failpoints without rules
  bool is_journaled;
};

struct Fixture {
  explicit Fixture(const Variant& variant, int queue_depth = 8) {
    kvx::BackendOptions options;
    options.queue_depth = queue_depth;
    failpoints = std::make_shared<kvx::Failpoints>();
    if (variant.is_faulty) options.failpoints = failpoints;
    if (variant.is_journaled) options.journal_path = "kvx_backends_journal";
    journal_path = options.journal_path;
    kvx::Status status = kvx::make_backend(
        variant.kind, options, [this](std::span<const IoCompletion> done) { sink(done); }, &backend,
        nullptr);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
    CHECK(status.ok());
  }
  ~Fixture() {
    (void)backend->close(kPatience_s);
    if (!journal_path.empty()) unlink(journal_path.c_str());
  }

  uint64_t submit(IoKind kind, const File& file, uint8_t* data, int64_t bytes, int64_t offset) {
    const IoRequest request = {kind, file.fd, data, bytes, offset, next_token++};
    backend->submit({&request, 1});
    return request.token;
  }
  Code run(IoKind kind, const File& file, uint8_t* data, int64_t bytes, int64_t offset) {
    return sink.wait(submit(kind, file, data, bytes, offset)).code;
  }

  Sink sink;
  std::shared_ptr<kvx::Failpoints> failpoints;
  std::string journal_path;
  std::unique_ptr<kvx::IoBackend> backend;
  uint64_t next_token = 1;
};

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

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
  Buffer buffer(256 * kKiB);
  Sink sink;
  constexpr uint64_t kRequests = 500;
  {
    kvx::BackendOptions options;
    options.queue_depth = 4;
    if (variant.is_faulty) options.failpoints = std::make_shared<kvx::Failpoints>();
    std::unique_ptr<kvx::IoBackend> backend;
    const auto forward = [&](std::span<const IoCompletion> done) { sink(done); };
    CHECK(kvx::make_backend(variant.kind, options, forward, &backend, nullptr).ok());
    std::thread submitter([&] {
      for (uint64_t i = 0; i < kRequests; ++i) {
        const IoRequest request = {IoKind::kWrite, file.fd, buffer.data, buffer.bytes, 0, i};
        backend->submit({&request, 1});
      }
    });
    while (sink.count() < 5) std::this_thread::yield();
    CHECK(backend->close(kPatience_s) == 0);
    submitter.join();
  }
  CHECK(sink.count() == kRequests);
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

// ---- Faults ---------------------------------------------------------------------------------

FaultRule rule(FaultTarget target, FaultAction action) {
  FaultRule made;
  made.target = target;
  made.action = action;
  made.seed = 42;
  return made;
}

void test_hung(const Variant& variant) {
  File file(false);
  Buffer buffer(64 * kKiB);
  Fixture fixture(variant);
  FaultRule hang = rule(FaultTarget::kWrite, FaultAction::kHang);
  hang.count = 3;
  CHECK(fixture.failpoints->set(hang).ok());
  const uint64_t one = fixture.submit(IoKind::kWrite, file, buffer.data, 4096, 0);
  const uint64_t two = fixture.submit(IoKind::kWrite, file, buffer.data, 4096, 0);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data, 0, 0) == Code::kOk);
  CHECK(!fixture.sink.has(one) && !fixture.sink.has(two));
  fixture.backend->cancel(one);
  CHECK(fixture.sink.wait(one).code == Code::kCancelled);
  fixture.failpoints->clear();
  CHECK(fixture.sink.wait(two).code == Code::kOk);

  FaultRule stuck = rule(FaultTarget::kAny, FaultAction::kHang);
  stuck.ignores_cancel = true;
  stuck.count = 2;
  CHECK(fixture.failpoints->set(stuck).ok());
  const uint64_t three = fixture.submit(IoKind::kWrite, file, buffer.data, 4096, 0);
  const uint64_t four = fixture.submit(IoKind::kSync, file, nullptr, 0, 0);
  CHECK(fixture.run(IoKind::kWrite, file, buffer.data, 4096, 0) == Code::kOk);
  fixture.backend->cancel(three);
  const double start = now_s();
  CHECK(fixture.backend->close(0.2) == 2);
  CHECK(now_s() - start >= 0.2 && now_s() - start < 5.0);
  fixture.failpoints->clear();
  CHECK(!fixture.sink.has(three) && !fixture.sink.has(four));
  CHECK(fixture.failpoints->hits()[static_cast<size_t>(FaultAction::kHang)] == 4);
}

void test_delay_keeps_others_going(const Variant& variant) {
  File file(false);
  Buffer buffer(64 * kKiB);
  Fixture fixture(variant);
  FaultRule delay = rule(FaultTarget::kWrite, FaultAction::kDelay);
  delay.delay_s = 0.2;
  delay.count = 20;  // more than the posix backend has threads
  CHECK(fixture.failpoints->set(delay).ok());
  const double start = now_s();
  std::vector<uint64_t> late;
  for (int i = 0; i < 20; ++i) {
    late.push_back(fixture.submit(IoKind::kWrite, file, buffer.data, 4096, 0));
  }
  CHECK(fixture.run(IoKind::kWrite, file, buffer.data, 4096, 0) == Code::kOk);
  CHECK(!fixture.sink.has(late[0]));
  for (const uint64_t token : late) CHECK(fixture.sink.wait(token).code == Code::kOk);
  CHECK(now_s() - start >= 0.2 && now_s() - start < 5.0);
}

void test_spoiled_bytes(const Variant& variant) {
  File file(true);
  constexpr int64_t kBytes = 16 * kKiB;
  Buffer old(kBytes), fresh(kBytes), read(kBytes);
  old.fill(8);
  fresh.fill(9);
  Fixture fixture(variant);
  const auto spoil = [&](FaultTarget target, FaultAction action, bool reports_error = false) {
    fixture.failpoints->clear();
    CHECK(fixture.run(IoKind::kWrite, file, old.data, kBytes, 0) == Code::kOk);
    FaultRule once = rule(target, action);
    once.count = 1;
    once.torn_reports_error = reports_error;
    CHECK(fixture.failpoints->set(once).ok());
    const bool is_read = target == FaultTarget::kRead;
    std::memset(read.data, 0, kBytes);
    return is_read ? fixture.run(IoKind::kRead, file, read.data, kBytes, 0)
                   : fixture.run(IoKind::kWrite, file, fresh.data, kBytes, 0);
  };
  const auto bits_off = [&](const uint8_t* a, const uint8_t* b) {
    int bits = 0;
    for (int64_t i = 0; i < kBytes; ++i) bits += __builtin_popcount(a[i] ^ b[i]);
    return bits;
  };
  const auto on_disk = [&] { return file.content(); };

  CHECK(spoil(FaultTarget::kWrite, FaultAction::kEio) == Code::kStorage);
  CHECK(bits_off(on_disk().data(), old.data) == 0);
  CHECK(spoil(FaultTarget::kWrite, FaultAction::kEnospc) == Code::kStorage);
  CHECK(spoil(FaultTarget::kWrite, FaultAction::kDrop) == Code::kOk);
  CHECK(bits_off(on_disk().data(), old.data) == 0);
  CHECK(spoil(FaultTarget::kWrite, FaultAction::kFlip) == Code::kOk);
  CHECK(bits_off(on_disk().data(), fresh.data) == 1);
  CHECK(spoil(FaultTarget::kRead, FaultAction::kFlip) == Code::kOk);
  CHECK(bits_off(read.data, old.data) == 1);
  CHECK(spoil(FaultTarget::kRead, FaultAction::kShort) == Code::kShort);
  CHECK(std::memcmp(read.data, old.data, kBytes / 2) == 0);
  CHECK(std::memcmp(read.data + kBytes / 2, old.data + kBytes / 2, kBytes / 2) != 0);
  CHECK(spoil(FaultTarget::kWrite, FaultAction::kShort) == Code::kShort);

  for (const bool reports_error : {false, true}) {
    const Code code = spoil(FaultTarget::kWrite, FaultAction::kTorn, reports_error);
    CHECK(code == (reports_error ? Code::kStorage : Code::kOk));
    const std::vector<uint8_t> torn = on_disk();
    int fresh_sectors = 0;
    for (int64_t at = 0; at < kBytes; at += 512) {
      const bool is_fresh = std::memcmp(torn.data() + at, fresh.data + at, 512) == 0;
      CHECK(is_fresh || std::memcmp(torn.data() + at, old.data + at, 512) == 0);
      fresh_sectors += is_fresh ? 1 : 0;
    }
    CHECK(fresh_sectors > 0 && fresh_sectors < kBytes / 512);
  }
  CHECK(fixture.run(IoKind::kWrite, file, fresh.data, kBytes, 0) == Code::kOk);
  CHECK(bits_off(on_disk().data(), fresh.data) == 0);
}

void test_rules() {
  kvx::Failpoints failpoints;
  FaultRule third = rule(FaultTarget::kAny, FaultAction::kEio);
  third.after = 2;
  third.count = 1;
  CHECK(failpoints.set(third).ok());
  CHECK(!failpoints.next(IoKind::kRead) && !failpoints.next(IoKind::kSync));
  CHECK(failpoints.next(IoKind::kWrite) && !failpoints.next(IoKind::kWrite));
  CHECK(failpoints.set(rule(FaultTarget::kRead, FaultAction::kTorn)).code() == Code::kUsage);
  FaultRule seldom = rule(FaultTarget::kRead, FaultAction::kDrop);
  seldom.probability = 0.25;
  std::vector<std::vector<bool>> runs(2);
  for (auto& run : runs) {
    failpoints.clear();
    CHECK(failpoints.set(seldom).ok());
    for (int i = 0; i < 1000; ++i) run.push_back(failpoints.next(IoKind::kRead).has_value());
  }
  CHECK(runs[0] == runs[1]);
  const int64_t drops = failpoints.hits()[static_cast<size_t>(FaultAction::kDrop)] / 2;
  CHECK(drops > 200 && drops < 300);
  FaultAction action = FaultAction::kEio;
  CHECK(kvx::parse_fault_action("torn", &action).ok() && action == FaultAction::kTorn);
  CHECK(kvx::parse_fault_action("tron", &action).code() == Code::kUsage);
}

void test_journal(const Variant& variant) {
  struct Record {
    uint8_t type, kind;
    uint16_t zero;
    int32_t code;
    uint64_t sequence, device, inode;
    int64_t offset, bytes;
  };
  File file(true);
  Buffer buffer(16 * kKiB);
  buffer.fill(10);
  Fixture fixture(variant);
  CHECK(fixture.run(IoKind::kWrite, file, buffer.data, 8 * kKiB, 4096) == Code::kOk);
  CHECK(fixture.run(IoKind::kRead, file, buffer.data + 8 * kKiB, 4096, 0) == Code::kOk);
  CHECK(fixture.run(IoKind::kSync, file, nullptr, 0, 0) == Code::kOk);
  CHECK(fixture.backend->close(kPatience_s) == 0);
  std::vector<uint8_t> journal(1 << 20);
  const int fd = open(fixture.journal_path.c_str(), O_RDONLY);
  const ssize_t bytes = read(fd, journal.data(), journal.size());
  ::close(fd);
  CHECK(bytes == 8 + 5 * 48 + 8 * kKiB);
  CHECK(std::memcmp(journal.data(), "KVXJRNL1", 8) == 0);
  const auto record_at = [&](int64_t at) {
    Record record;
    std::memcpy(&record, journal.data() + at, sizeof record);
    return record;
  };
  struct stat facts = {};
  CHECK(fstat(file.fd, &facts) == 0);
  const Record write = record_at(8);
  CHECK(write.type == 1 && write.kind == 1 && write.sequence == 0 && write.offset == 4096);
  CHECK(write.bytes == 8 * kKiB && write.inode == facts.st_ino && write.device == facts.st_dev);
  CHECK(std::memcmp(journal.data() + 56, buffer.data, 8 * kKiB) == 0);
  const int64_t rest = 56 + 8 * kKiB;
  CHECK(record_at(rest).type == 2 && record_at(rest).kind == 1);
  CHECK(record_at(rest + 48).type == 1 && record_at(rest + 48).kind == 2);
  CHECK(record_at(rest + 96).type == 2 && record_at(rest + 96).sequence == 1);
  CHECK(record_at(rest + 144).type == 3);
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
  test_rules();
  test_files();
  std::vector<BackendKind> kinds = {BackendKind::kPosix};
  if (const kvx::Status status = kvx::probe_io_uring(); status.ok()) {
    kinds.push_back(BackendKind::kUring);
  } else {
    std::printf("io_uring is not tested: %s\n", status.message().c_str());
  }
  for (const BackendKind kind : kinds) {
    for (const auto& [is_faulty, is_journaled] :
         {std::pair{false, false}, {true, false}, {false, true}, {true, true}}) {
      const Variant variant = {kind, is_faulty, is_journaled};
      std::printf("%s%s%s\n", kind == BackendKind::kPosix ? "posix" : "io_uring",
                  is_faulty ? " faulty" : "", is_journaled ? " journal" : "");
      for (const bool wants_direct : {false, true}) {
        test_round_trip(variant, wants_direct);
        test_edges(variant, wants_direct);
      }
      test_many(variant);
      test_threads(variant);
      test_registered(variant);
      test_submit_in_sink_and_after_close(variant);
      test_close_under_load(variant);
      test_stuck_in_kernel(variant);
      if (is_journaled) test_journal(variant);
      if (!is_faulty) continue;
      test_hung(variant);
      test_delay_keeps_others_going(variant);
      test_spoiled_bytes(variant);
    }
  }
  std::puts("ok");
  return 0;
}
