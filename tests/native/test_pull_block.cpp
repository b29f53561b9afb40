// One block pulled: against a model, out of mapped and of foreign memory, and every way to fail.
// Usage: test_pull_block [seed]
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "pull_fixture.h"
#include "shim/sabotage.h"

namespace {

using namespace pulls;
using kvx::PullOutcome;
using kvx::PullTask;

constexpr int64_t kRegionBytes = 4 << 20;

// A block of `total` bytes in rows of a random divisor of it.
Descriptor random_block(std::mt19937_64& random, int64_t total) {
  Descriptor block{0, 0, 1, total};
  const int64_t wanted = static_cast<int64_t>(1 + random() % 300);
  for (int64_t count = wanted; count > 1; --count) {
    if (total % count != 0) continue;
    block.count = count;
    block.bytes = total / count;
    break;
  }
  const int64_t room = (kRegionBytes - total) / block.count;
  const int64_t gap = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 70);
  block.stride = block.bytes + std::min(gap, room);
  const int64_t extent = (block.count - 1) * block.stride + block.bytes;
  block.offset = static_cast<int64_t>(random() % static_cast<uint64_t>(kRegionBytes - extent + 1));
  return block;
}

void make_foreign(PullTask* task, const std::vector<uint8_t>& source, pid_t pid) {
  task->source.mapped = nullptr;
  task->source.pid = pid;
  task->source.foreign_base = reinterpret_cast<uint64_t>(source.data());
}

void test_against_model(std::mt19937_64& random) {
  Bed bed(random_bytes(random, kRegionBytes), random_bytes(random, kRegionBytes));
  const LeaseRef ref = bed.grant_all();
  for (int round = 0; round < 200; ++round) {
    const bool is_large = round % 50 == 0;
    const auto total = static_cast<int64_t>(1 + random() % (is_large ? 3 << 20 : 20'000));
    const Descriptor local = random_block(random, total);
    const Descriptor remote = random_block(random, total);
    kvx::RemotePlan plan = bed.plan({local}, {remote});
    std::vector<uint8_t> key(kvx::kKeyBytes);
    if (random() % 2 == 0) plan.keys = key = random_bytes(random, kvx::kKeyBytes);
    const std::vector<uint8_t> bytes = canonical(bed.source, remote);
    const uint64_t checksum = checksum_of(bytes, key.data());
    const bool is_damaged = random() % 4 == 0;
    if (is_damaged || random() % 2 == 0) plan.checksums = {checksum ^ (is_damaged ? 1 : 0)};
    std::vector<uint8_t> expected = bed.target;
    put(&expected, local, is_damaged ? std::vector<uint8_t>(bytes.size(), 0xff) : bytes);
    const auto task = bed.task(std::move(plan), ref);
    if (random() % 2 == 0) make_foreign(task.get(), bed.source, getpid());
    const PullOutcome outcome = pull_block(*task, 0);
    CHECK(outcome.code == (is_damaged ? Code::kCorrupt : Code::kOk));
    CHECK(outcome.checksum == checksum && outcome.error_number == 0);
    CHECK(bed.target == expected);  // and not a byte beside it
  }
}

struct Small {
  Small() : bed(std::vector<uint8_t>(64, 7), std::vector<uint8_t>(96, 1)) {}
  std::shared_ptr<PullTask> task(const LeaseRef& ref) const {
    return bed.task(bed.plan({local}, {{0, 16, 4, 8}}), ref);
  }
  // Whether the rows of the block are all `row`, and everything else is untouched.
  bool is(uint8_t row) const {
    std::vector<uint8_t> expected(96, 1);
    put(&expected, local, std::vector<uint8_t>(32, row));
    return bed.target == expected;
  }
  Bed bed;
  Descriptor local{16, 20, 2, 16};
};

class Interruption {
 public:
  explicit Interruption(std::function<void()> call) { kvx::interruption() = std::move(call); }
  ~Interruption() { kvx::interruption() = nullptr; }
};

// Calls `act` at the given step of a copy: 1 before the first look, then before each row.
std::function<void()> at_step(int step, std::function<void()> act) {
  return [step, act = std::move(act), calls = 0]() mutable {
    if (++calls == step) act();
  };
}

void test_stale() {
  Small small;
  const LeaseRef ended = small.bed.grant_all();
  CHECK(small.bed.leases->revoke(ended.id, 0).ok());
  CHECK(pull_block(*small.task(ended), 0).code == Code::kStale && small.is(1));
  const LeaseRef expired = small.bed.grant({{0, 0, 1, 64}}, 1e-9);
  CHECK(pull_block(*small.task(expired), 0).code == Code::kStale && small.is(1));
  // Steps: 1 first look, 2..5 the rows, 6 the second look.
  for (int step = 1; step <= 6; ++step) {
    const LeaseRef ref = small.bed.grant_all();
    std::fill(small.bed.target.begin(), small.bed.target.end(), uint8_t{1});
    Interruption interruption(
        at_step(step, [&] { CHECK(small.bed.leases->revoke(ref.id, 0).ok()); }));
    const PullOutcome outcome = pull_block(*small.task(ref), 0);
    CHECK(outcome.code == Code::kStale && outcome.checksum == 0);
    CHECK(small.is(step == 1 ? 1 : 0xff));
  }
}

void test_may_write() {
  Small small;
  const LeaseRef ref = small.bed.grant_all();
  auto task = small.task(ref);
  bool may = false;
  task->may_write = [&] { return may; };
  CHECK(pull_block(*task, 0).code == Code::kStale && small.is(1));
  may = true;
  CHECK(pull_block(*task, 0).code == Code::kOk && small.is(7));
  // Neither copied nor poisoned once it says no.
  std::fill(small.bed.target.begin(), small.bed.target.end(), uint8_t{1});
  Interruption interruption(at_step(6, [&] {
    may = false;
    CHECK(small.bed.leases->revoke(ref.id, 0).ok());
  }));
  CHECK(pull_block(*task, 0).code == Code::kStale && small.is(7));
}

void test_ended_transfer_stops() {
  Small small;
  auto task = small.task(small.bed.grant_all());
  task->record->is_claimed = true;
  CHECK(pull_block(*task, 0).code == Code::kCancelled && small.is(1));
  task->record->is_claimed = false;
  Interruption interruption(at_step(3, [&] { task->record->is_claimed = true; }));
  CHECK(pull_block(*task, 0).code == Code::kCancelled && small.is(0xff));
}

// A process whose copy of our memory holds 9s instead; ends when killed.
pid_t fork_owner(std::vector<uint8_t>* source) {
  int ready[2];
  CHECK(pipe(ready) == 0);
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    std::fill(source->begin(), source->end(), uint8_t{9});
    if (write(ready[1], "r", 1) != 1) _exit(1);
    for (;;) pause();
  }
  char byte = 0;
  CHECK(read(ready[0], &byte, 1) == 1);
  close(ready[0]);
  close(ready[1]);
  return pid;
}

void end_owner(pid_t pid) {
  kill(pid, SIGKILL);
  CHECK(waitpid(pid, nullptr, 0) == pid);
}

void test_foreign_process() {
  Small small;
  const LeaseRef ref = small.bed.grant_all();
  const pid_t pid = fork_owner(&small.bed.source);
  auto task = small.task(ref);
  make_foreign(task.get(), small.bed.source, pid);
  bool is_there = true;
  task->is_peer_there = [&] { return is_there; };
  CHECK(pull_block(*task, 0).code == Code::kOk && small.is(9));
  {
    // Gone between the looks, its number perhaps another's by now.
    Interruption interruption(at_step(2, [&] { is_there = false; }));
    CHECK(pull_block(*task, 0).code == Code::kPeerLost && small.is(0xff));
  }
  std::fill(small.bed.target.begin(), small.bed.target.end(), uint8_t{1});
  CHECK(pull_block(*task, 0).code == Code::kPeerLost && small.is(1));
  is_there = true;
  // Memory that it does not have.
  task->source.foreign_base = 4096;
  const PullOutcome outcome = pull_block(*task, 0);
  CHECK(outcome.code == Code::kUnavailable && outcome.error_number == EFAULT && small.is(1));
  make_foreign(task.get(), small.bed.source, pid);
  kill(pid, SIGKILL);
  siginfo_t ended{};
  CHECK(waitid(P_PID, static_cast<id_t>(pid), &ended, WEXITED | WNOWAIT) == 0);
  CHECK(pull_block(*task, 0).code == Code::kPeerLost && small.is(1));  // a zombie
  end_owner(pid);
  CHECK(pull_block(*task, 0).code == Code::kPeerLost && small.is(1));
}

// Killed in the midst of a block that takes several batches.
void test_foreign_process_dies_within_a_block(std::mt19937_64& random) {
  Bed bed(random_bytes(random, kRegionBytes), random_bytes(random, kRegionBytes));
  const pid_t pid = fork_owner(&bed.source);
  auto task =
      bed.task(bed.plan({{0, 0, 1, kRegionBytes}}, {{0, 0, 1, kRegionBytes}}), bed.grant_all());
  make_foreign(task.get(), bed.source, pid);
  {
    Interruption interruption(at_step(4, [&] { end_owner(pid); }));
    const PullOutcome outcome = pull_block(*task, 0);
    CHECK(outcome.code == Code::kPeerLost && outcome.error_number == ESRCH);
  }
  CHECK(bed.target == std::vector<uint8_t>(kRegionBytes, 0xff));
}

// Rows that the peer has up to the middle: a part is read before the refusal.
void test_foreign_memory_ends(std::mt19937_64& random) {
  auto* pages = static_cast<uint8_t*>(
      mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(pages != MAP_FAILED && munmap(pages + 4096, 4096) == 0);
  Bed bed(random_bytes(random, 8192), std::vector<uint8_t>(8192, 1));
  auto task = bed.task(bed.plan({{0, 0, 1, 8000}}, {{100, 0, 1, 8000}}), bed.grant_all());
  make_foreign(task.get(), bed.source, getpid());
  task->source.foreign_base = reinterpret_cast<uint64_t>(pages);
  const PullOutcome outcome = pull_block(*task, 0);
  CHECK(outcome.code == Code::kUnavailable && outcome.error_number == EFAULT);
  for (size_t i = 0; i < 8192; ++i) CHECK(bed.target[i] == (i < 8000 ? 0xff : 1));
  munmap(pages, 4096);
}

void test_foreign_process_refuses() {
  Small small;
  auto task = small.task(small.bed.grant_all());
  make_foreign(task.get(), small.bed.source, getpid());
  CHECK(prctl(PR_SET_DUMPABLE, 0) == 0);
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    // As root every process could be read.
    if (geteuid() == 0 && setuid(65534) != 0) _exit(2);
    const PullOutcome outcome = pull_block(*task, 0);
    const bool is_refused = outcome.code == Code::kUnavailable && outcome.error_number == EPERM;
    _exit(is_refused && small.is(1) ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK(prctl(PR_SET_DUMPABLE, 1) == 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::mt19937_64 random(seed);
  test_against_model(random);
  test_stale();
  test_may_write();
  test_ended_transfer_stops();
  test_foreign_process();
  test_foreign_process_dies_within_a_block(random);
  test_foreign_memory_ends(random);
  test_foreign_process_refuses();
  std::puts("pull block: ok");
  return 0;
}
