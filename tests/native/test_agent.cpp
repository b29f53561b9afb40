// Two agents: bytes arrive whole or are told not to have, whatever happens meanwhile.
// Usage: test_agent [seed]
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "agent_fixture.h"

namespace {

using namespace agents;

struct Case {
  Link link;
  Way way;
};
constexpr std::array<Case, 5> kCases{{{Link::kPair, Way::kPull},
                                      {Link::kUnix, Way::kPull},
                                      {Link::kPair, Way::kStream},
                                      {Link::kUnix, Way::kStream},
                                      {Link::kTcp, Way::kStream}}};

std::vector<int32_t> codes_of(const RemoteJob& job) {
  std::vector<int32_t> codes(static_cast<size_t>(job.blocks()));
  job.codes(codes);
  return codes;
}

bool all_are(const RemoteJob& job, Code code) {
  const auto codes = codes_of(job);
  return std::all_of(codes.begin(), codes.end(),
                     [&](int32_t one) { return one == static_cast<int32_t>(code); });
}

// Strided on both sides, of other rows: 4 x 300 here, 3 x 400 there.
void test_strided(Case one, std::mt19937_64& random) {
  Two two(one.link, 1 << 20);
  fill(random, two.theirs.data(), 1 << 20);
  std::vector<Descriptor> local;
  std::vector<Descriptor> remote;
  for (int64_t i = 0; i < 100; ++i) {
    local.push_back({i * 4000, 1000, 4, 300});
    remote.push_back({i * 3000 + 7, 500, 3, 400});
  }
  const auto ref = two.lease(remote, kvx::kMayRead | kvx::kMayWrite);
  const auto plan = two.plan(local, remote, all_of(100));
  for (const bool is_write : {false, true}) {
    fill(random, is_write ? two.ours.data() : two.theirs.data(), 1 << 20);
    const auto job = two.submit(is_write, one.way, ref, plan);
    CHECK(job->wait(10.0) && job->state() == kvx::JobState::kDone && job->bytes_done() == 120'000);
    for (size_t block = 0; block < 100; ++block) {
      for (int64_t at = 0; at < 1200; ++at) {
        const Descriptor& here = local[block];
        const Descriptor& there = remote[block];
        CHECK(two.ours.data()[here.offset + at / 300 * 1000 + at % 300] ==
              two.theirs.data()[there.offset + at / 400 * 500 + at % 400]);
      }
    }
  }
}

void test_range_lease(Case one, std::mt19937_64& random) {
  Two two(one.link, 1 << 20);
  fill(random, two.theirs.data(), 1 << 20);
  const auto ref = two.lease({{4096, 0, 1, 65536}}, kvx::kMayRead);
  const auto inside =
      two.submit(false, one.way, ref, two.plan({{0, 0, 1, 5000}}, {{8000, 0, 1, 5000}}, {}));
  CHECK(inside->wait(5.0) && inside->state() == kvx::JobState::kDone);
  CHECK(std::memcmp(two.ours.data(), two.theirs.data() + 8000, 5000) == 0);
  // What is copied on this host is checked by the copier; a stream is checked by the owner.
  if (one.way == Way::kPull) return;
  const auto outside =
      two.submit(false, one.way, ref, two.plan({{0, 0, 1, 5000}}, {{66000, 0, 1, 5000}}, {}));
  CHECK(outside->wait(5.0) && outside->state() == kvx::JobState::kFailed);
  CHECK(all_are(*outside, Code::kUsage) && two.other->stats().refused_requests == 1);
  const auto write =
      two.submit(true, one.way, ref, two.plan({{0, 0, 1, 5000}}, {{8000, 0, 1, 5000}}, {}));
  CHECK(write->wait(5.0) && write->state() == kvx::JobState::kFailed);
}

void test_leases_end(Case one) {
  Two two(one.link, 1 << 20);
  const auto blocks = rows(0, 4, 4096);
  const auto plan = two.plan(blocks, blocks, all_of(4));
  const auto revoked = two.lease(blocks, kvx::kMayRead | kvx::kMayWrite);
  CHECK(two.other->revoke(revoked.id, 5.0).ok());
  const auto expired = two.lease(blocks, kvx::kMayRead | kvx::kMayWrite, 0.01);
  usleep(30'000);
  auto forged = two.lease(blocks, kvx::kMayRead | kvx::kMayWrite);
  forged.generation += 1;
  std::memset(two.theirs.data(), 1, 4 * 4096);
  std::memset(two.ours.data(), 2, 4 * 4096);
  for (const auto& ref : {revoked, expired, forged}) {
    for (const bool is_write : {false, true}) {
      const auto job = two.submit(is_write, one.way, ref, plan);
      CHECK(job->wait(5.0) && job->state() == kvx::JobState::kFailed);
      CHECK(all_are(*job, Code::kStale));
      if (is_write) CHECK(two.theirs.data()[0] == 1);
    }
  }
  CHECK(two.other->remove_region(two.theirs.id, 5.0).code() == Code::kTimeout);
  CHECK(two.other->revoke(forged.id, 5.0).ok());
  CHECK(two.other->remove_region(two.theirs.id, 5.0).ok());
}

void test_notes(Case one) {
  Two two(one.link, 1 << 20);
  const auto blocks = rows(0, 3, 100'000);
  const auto ref = two.lease(blocks, kvx::kMayRead | kvx::kMayWrite);
  const auto plan = two.plan(blocks, blocks, all_of(3));
  for (const bool is_write : {false, true}) {
    const std::vector<uint8_t> note{1, 2, static_cast<uint8_t>(is_write)};
    CHECK(two.submit(is_write, one.way, ref, plan, 5.0, note)->wait(5.0));
    CHECK(next_event(*two.other, EventKind::kNote).payload == note);
  }
  const auto watched = two.submit(true, one.way, ref, plan);
  if (!watched->watch()) CHECK(next_event(*two.one, EventKind::kEnded).id == watched->id());
}

void test_lost(Case one) {
  Two two(one.link, 64 << 20);
  const auto blocks = rows(0, 64, 1 << 20);
  const auto ref = two.lease(blocks, kvx::kMayRead | kvx::kMayWrite);
  const auto plan = two.plan(blocks, blocks, all_of(64));
  const auto job = two.submit(true, one.way, ref, plan);
  CHECK(two.other->drop(two.at_other, "the test").ok());
  CHECK(job->wait(5.0) && job->wait_quiesced(5.0));
  CHECK(job->state() == kvx::JobState::kDone || job->is_lost());
  std::shared_ptr<RemoteJob> none;
  (void)next_event(*two.one, EventKind::kClosed);
  CHECK(
      two.one
          ->submit({.way = one.way, .peer = kOther, .lease = ref, .plan = plan, .deadline_s = 1.0},
                   &none)
          .code() == Code::kPeerLost);
  CHECK(two.one->stats().running == 0 && two.one->stats().quarantined == 0);
}

// Transfers of all sizes while leases are revoked, transfers cancelled and deadlines short: what
// is said to be there is there, and everything ends.
// Whoever has heard of a region elsewhere waits for its announcement, and for nothing that is gone.
void test_regions_are_awaited(Case one) {
  if (one.link == Link::kTcp) return;
  Two two(one.link, 4096);
  const uint32_t next = two.theirs.id + 1;
  std::thread waiter([&] { CHECK(two.one->can_pull(kOther, next, kPatienceS).ok()); });
  Memory later;
  later.create(*two.other, 4096);
  waiter.join();
  CHECK(later.id == next);
  CHECK(two.other->remove_region(next, kPatienceS).ok());
  while (two.one->can_pull(kOther, next).ok()) usleep(100);
  const auto begun = std::chrono::steady_clock::now();
  CHECK(two.one->can_pull(kOther, next, kPatienceS).code() == Code::kStale);
  CHECK(std::chrono::steady_clock::now() - begun < std::chrono::duration<double>(kPatienceS / 2));
}

void test_storm(Case one, std::mt19937_64& random) {
  constexpr int64_t kBytes = 8 << 20;
  Two two(one.link, kBytes);
  fill(random, two.theirs.data(), kBytes);
  std::vector<std::shared_ptr<RemoteJob>> kept;
  for (int turn = 0; turn < 150; ++turn) {
    const int64_t bytes = int64_t{1} << (random() % 9 + 10);
    const int64_t count =
        std::min<int64_t>(static_cast<int64_t>(random() % 40) + 1, kBytes / bytes);
    const auto blocks = rows(0, count, bytes);
    const bool is_write = random() % 2 == 0;
    const auto ref = two.lease(blocks, kvx::kMayRead | kvx::kMayWrite);
    const auto plan = two.plan(blocks, blocks, all_of(blocks.size()));
    const uint64_t what = random() % 6;
    const double deadline_s = what == 0 ? 1e-4 * static_cast<double>(random() % 20) : 10.0;
    const auto job = two.submit(is_write, one.way, ref, plan, deadline_s);
    std::thread meddler;
    if (what == 1) meddler = std::thread([&] { (void)job->cancel(); });
    if (what == 2) meddler = std::thread([&] { CHECK(two.other->revoke(ref.id, 5.0).ok()); });
    CHECK(job->wait(20.0));
    CHECK(job->wait_quiesced(5.0));
    if (meddler.joinable()) meddler.join();
    const auto codes = codes_of(*job);
    for (size_t i = 0; i < codes.size(); ++i) {
      CHECK(codes[i] >= 0);
      if (codes[i] != 0) continue;
      CHECK(std::memcmp(two.ours.data() + blocks[i].offset, two.theirs.data() + blocks[i].offset,
                        static_cast<size_t>(bytes)) == 0);
    }
    if (what > 2) CHECK(job->state() == kvx::JobState::kDone);
    // Only now does its owner know that nobody is at work there any more.
    CHECK(two.other->revoke(ref.id, 5.0).ok());
    fill(random, two.theirs.data(), bytes);
    fill(random, two.ours.data(), bytes);
  }
  CHECK(two.one->stats().running == 0 && two.one->stats().quarantined == 0);
  CHECK(two.one->quarantine().empty() && two.other->stats().served == 0);
  CHECK(two.other->remove_region(two.theirs.id, 5.0).ok());
  CHECK(two.one->remove_region(two.ours.id, 5.0).ok());
}

// Deadlines that pass while a transfer is still being begun, here or by its receiver.
void test_hurried(Case one, std::mt19937_64& random) {
  Two two(one.link, 4 << 20);
  const auto ref = two.lease(rows(0, 64, 64 << 10), kvx::kMayRead | kvx::kMayWrite);
  std::vector<std::shared_ptr<const RemotePlan>> plans;
  for (uint32_t i = 0; i < 4; ++i) {  // of different memory: they are under way at once
    const auto blocks = rows(i * 16, 16, 64 << 10);
    std::vector<uint32_t> indices = all_of(16);
    for (uint32_t& index : indices) index += i * 16;
    plans.push_back(two.plan(blocks, blocks, indices));
  }
  for (int turn = 0; turn < 400; ++turn) {
    std::vector<std::shared_ptr<RemoteJob>> jobs;
    for (size_t i = 0; i < plans.size(); ++i) {
      const double deadline_s = 1e-6 * static_cast<double>(random() % 64 + 1);
      jobs.push_back(two.submit(i != 0, one.way, ref, plans[i], deadline_s));
    }
    for (const auto& job : jobs) CHECK(job->wait(5.0) && job->wait_quiesced(5.0));
  }
  CHECK(two.one->stats().running == 0 && two.one->stats().quarantined == 0);
  for (int turn = 0; turn < 500 && two.other->stats().served > 0; ++turn) usleep(10'000);
  CHECK(two.other->stats().served == 0);
}

void test_close_under_way(Case one) {
  Two two(one.link, 64 << 20);
  const auto all = rows(0, 64, 1 << 20);
  const auto ref = two.lease(all, kvx::kMayRead | kvx::kMayWrite);
  std::vector<std::shared_ptr<RemoteJob>> jobs;
  std::shared_ptr<const RemotePlan> plan;
  for (uint32_t i = 0; i < 4; ++i) {  // of different memory: they are under way at once
    const auto blocks = rows(i * 16, 16, 1 << 20);
    std::vector<uint32_t> indices = all_of(16);
    for (uint32_t& index : indices) index += i * 16;
    plan = two.plan(blocks, blocks, indices);
    jobs.push_back(two.submit(i % 2 == 0, one.way, ref, plan));
  }
  const auto report = two.one->close(0.02);
  CHECK(report.abandoned_jobs == 0);
  for (const auto& job : jobs) CHECK(job->is_terminal() && job->is_quiesced());
  std::shared_ptr<RemoteJob> none;
  CHECK(
      !two.one
           ->submit({.way = one.way, .peer = kOther, .lease = ref, .plan = plan, .deadline_s = 1.0},
                    &none)
           .ok());
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  for (const Case& one : kCases) {
    std::printf("link %d way %d\n", static_cast<int>(one.link), static_cast<int>(one.way));
    std::fflush(stdout);
    test_strided(one, random);
    test_range_lease(one, random);
    test_leases_end(one);
    test_notes(one);
    test_lost(one);
    test_regions_are_awaited(one);
    test_storm(one, random);
    test_hurried(one, random);
    test_close_under_way(one);
  }
  return 0;
}
