// What the tests of the file backends share: a sink that counts, memory, files, and the variants.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "kvx/backend_factory.h"

namespace backends_test {

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

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs `test` on every real backend that works here, plain and inside every decorator.
template <typename Test>
void for_each_variant(Test test) {
  std::vector<BackendKind> kinds = {BackendKind::kPosix};
  if (const kvx::Status status = kvx::probe_io_uring(); status.ok()) {
    kinds.push_back(BackendKind::kUring);
  } else {
    std::printf("io_uring is not tested: %s\n", status.message().c_str());
  }
  for (const BackendKind kind : kinds) {
    for (const auto& [is_faulty, is_journaled] :
         {std::pair{false, false}, {true, false}, {false, true}, {true, true}}) {
      std::printf("%s%s%s\n", kind == BackendKind::kPosix ? "posix" : "io_uring",
                  is_faulty ? " faulty" : "", is_journaled ? " journal" : "");
      test(Variant{kind, is_faulty, is_journaled});
    }
  }
}

}  // namespace backends_test
