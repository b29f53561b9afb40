// The decorators of the file backends: faults on purpose, and the journal of writes.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "backends_fixture.h"

namespace {

using namespace backends_test;

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

}  // namespace

int main() {
  test_rules();
  for_each_variant([](const Variant& variant) {
    if (variant.is_journaled) test_journal(variant);
    if (!variant.is_faulty) return;
    test_hung(variant);
    test_delay_keeps_others_going(variant);
    test_spoiled_bytes(variant);
  });
  std::puts("ok");
  return 0;
}
