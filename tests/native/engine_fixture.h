// Jobs of an engine in host memory: blocks of one plane, slots, a file, and what became of them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "kvx/engine.h"

namespace kvx::test {

inline constexpr double kLongS = 30.0;
inline constexpr int64_t kBlock = 4096;

struct Memory {
  explicit Memory(int64_t block_count)
      : blocks(block_count), data(static_cast<size_t>(block_count * kBlock)) {}

  uint8_t* at(int64_t block) { return data.data() + block * kBlock; }
  PlaneSet planes() {
    const Plane plane{data.data(), kBlock, kBlock};
    return PlaneSet({&plane, 1});
  }
  std::vector<int64_t> addresses() {
    std::vector<int64_t> result;
    for (int64_t i = 0; i < blocks; ++i) result.push_back(reinterpret_cast<int64_t>(at(i)));
    return result;
  }
  void fill(uint8_t seed) {
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i * 7 + seed);
  }

  int64_t blocks;
  std::vector<uint8_t> data;
};

inline std::vector<int64_t> counting(int64_t count, int64_t step) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(i * step);
  return values;
}

inline std::vector<uint8_t> some_keys(int64_t count) {
  std::vector<uint8_t> keys(static_cast<size_t>(count) * 16);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<uint8_t>(i / 16);
  return keys;
}

inline Batch gather(Memory& planes, Memory& slots) {
  Batch batch;
  batch.kind = JobKind::kCopyIn;
  batch.block_bytes = kBlock;
  batch.planes = planes.planes();
  batch.ids = counting(planes.blocks, 1);
  batch.addresses = slots.addresses();
  batch.keys = some_keys(planes.blocks);
  return batch;
}

inline Batch checked(JobKind kind, Memory& slots, const std::vector<uint64_t>& sums) {
  Batch batch;
  batch.kind = kind;
  batch.block_bytes = kBlock;
  batch.io_bytes = kBlock;
  batch.addresses = slots.addresses();
  batch.keys = some_keys(slots.blocks);
  batch.checksums = sums;
  return batch;
}

inline void with_files(Batch* batch, int fd) {
  batch->fds.assign(batch->addresses.size(), fd);
  batch->offsets = counting(batch->blocks(), kBlock);
}

inline Batch store(Memory& slots, int fd) {
  Batch batch;
  batch.kind = JobKind::kWrite;
  batch.addresses = slots.addresses();
  batch.bytes.assign(batch.addresses.size(), kBlock);
  batch.sync_fds = {fd};
  with_files(&batch, fd);
  return batch;
}

inline std::shared_ptr<Job> start(Engine& engine, Batch batch, double deadline_s = kLongS) {
  std::shared_ptr<Job> job;
  const Status status = engine.submit(std::move(batch), deadline_s, &job);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  CHECK(status.ok());
  return job;
}

inline void expect(const Job& job, JobState state) {
  CHECK(job.wait(kLongS));
  CHECK(job.state() == state);
}

inline std::vector<uint64_t> sums_of(const Job& job) {
  std::vector<uint64_t> sums(static_cast<size_t>(job.blocks()));
  job.checksums(sums);
  return sums;
}

inline std::vector<int32_t> codes_of(const Job& job) {
  std::vector<int32_t> codes(static_cast<size_t>(job.blocks()));
  job.codes(codes);
  return codes;
}

inline int temporary_file() {
  const int fd = memfd_create("engine", MFD_CLOEXEC);
  CHECK(fd >= 0);
  CHECK(ftruncate(fd, int64_t{1} << 20) == 0);
  return fd;
}

inline std::unique_ptr<Engine> make(BackendKind kind, int threads,
                                    std::shared_ptr<Failpoints> failpoints = nullptr) {
  EngineOptions options;
  options.copy_threads = threads;
  options.backend = kind;
  options.backend_options.failpoints = std::move(failpoints);
  std::unique_ptr<Engine> engine;
  const Status status = Engine::create(options, &engine);
  CHECK(status.ok());
  return engine;
}

}  // namespace kvx::test
