// Memory that only a backend of its own can touch: it is leased, and the agent keeps its hands off.
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "agent_fixture.h"
#include "kvx/peer_sight.h"

namespace {

using namespace agents;

constexpr int64_t kBytes = 1 << 20;

kvx::LeaseRef grant(Agent& agent, uint32_t region, uint8_t rights, double ttl_s = 60.0) {
  kvx::LeaseRef ref;
  const Status status =
      agent.grant(region, {.rights = rights, .ttl_s = ttl_s, .blocks = {{0, 0, 1, 4096}}}, &ref);
  CHECK(status.ok());
  return ref;
}

void test_numbers() {
  kvx::RegionTable table;
  uint32_t plain = 0;
  uint32_t first = 0;
  uint32_t second = 0;
  uint8_t byte = 0;
  CHECK(table.add(&byte, 1, -1, 0, &plain).ok() && plain < kvx::kOpaqueRegions);
  CHECK(table.add_opaque(kBytes, &first).ok() && first >= kvx::kOpaqueRegions);
  CHECK(table.add_opaque(kBytes, &second).ok() && second > first);
  CHECK(table.add_opaque(0, &second).code() == Code::kUsage);
  CHECK(table.hold(first)->is_opaque() && !table.hold(plain)->is_opaque());
  CHECK(table.remove(first, 0.0).ok() && !table.hold(first));
}

// Whatever a peer asks for, no byte is looked for at an address that is none.
void test_no_way_touches_them(Link link, Way way) {
  Two two(link, kBytes);
  uint32_t opaque = 0;
  CHECK(two.other->add_opaque_region(kBytes, &opaque).ok());
  const auto ref = grant(*two.other, opaque, kvx::kMayRead | kvx::kMayWrite);
  CHECK(!two.one->can_pull(kOther, opaque).ok());
  for (const bool is_write : {false, true}) {
    auto plan = std::make_shared<RemotePlan>();
    plan->region = two.ours.id;
    plan->local = {{0, 0, 1, 4096}};
    plan->remote_region = opaque;
    plan->remote = {{0, 0, 1, 4096}};
    plan->indices = {0};
    CHECK(kvx::finish_plan(plan.get(), kBytes).ok());
    std::shared_ptr<RemoteJob> job;
    const Status status = two.one->submit({.is_write = is_write,
                                           .way = way,
                                           .peer = kOther,
                                           .lease = ref,
                                           .plan = plan,
                                           .deadline_s = 5.0},
                                          &job);
    if (!status.ok()) {  // a read that would have to be pulled finds nothing to map
      CHECK(way == Way::kPull && !is_write && status.code() == Code::kStale);
      continue;
    }
    CHECK(job->wait(5.0) && job->state() == kvx::JobState::kFailed);
    int32_t code = 0;
    job->codes({&code, 1});
    CHECK(code == static_cast<int32_t>(Code::kUnavailable));
  }
  // Nor is the agent itself made to.
  std::shared_ptr<RemoteJob> job;
  auto plan = std::make_shared<RemotePlan>();
  CHECK(two.one->add_opaque_region(kBytes, &plan->region).ok());
  plan->local = {{0, 0, 1, 4096}};
  plan->remote_region = two.theirs.id;
  plan->remote = {{0, 0, 1, 4096}};
  plan->indices = {0};
  CHECK(kvx::finish_plan(plan.get(), kBytes).ok());
  const auto other = grant(*two.other, two.theirs.id, kvx::kMayRead);
  CHECK(two.one
            ->submit({.way = way, .peer = kOther, .lease = other, .plan = plan, .deadline_s = 5.0},
                     &job)
            .code() == Code::kUsage);
}

void test_leases_are_held() {
  Two two(Link::kUnix, kBytes);
  uint32_t opaque = 0;
  CHECK(two.other->add_opaque_region(kBytes, &opaque).ok());
  const auto ref = grant(*two.other, opaque, kvx::kMayWrite);
  std::shared_ptr<kvx::LeaseHold> hold;
  CHECK(two.other->use_lease(ref, kOther, kvx::kMayRead, &hold).code() == Code::kUsage);
  CHECK(two.other->use_lease(ref, kOther, kvx::kMayWrite, &hold).ok());
  CHECK((**hold).region->id() == opaque && hold->is_live());
  // Revoking ends it for whoever looks, and waits for who holds it.
  CHECK(two.other->revoke(ref.id, 0.01).code() == Code::kTimeout && !hold->is_live());
  CHECK(two.other->remove_region(opaque, 0.01).code() == Code::kTimeout);
  hold.reset();
  CHECK(two.other->revoke(ref.id, 0.01).ok());
  CHECK(two.other->remove_region(opaque, 1.0).ok());
  const auto last = grant(*two.other, two.theirs.id, kvx::kMayWrite);
  CHECK(two.other->use_lease(last, kOther, kvx::kMayWrite, &hold).ok());
  two.other->close(1.0);
  two.other.reset();
  hold.reset();  // the table is still there
}

void test_a_sight_of_leases() {
  Two two(Link::kUnix, kBytes);
  std::shared_ptr<const kvx::PeerSight> sight;
  CHECK(two.one->sight(99, &sight).code() == Code::kPeerLost);
  CHECK(two.one->sight(kOther, &sight).ok());
  const auto ref = grant(*two.other, two.theirs.id, kvx::kMayRead);
  const auto brief = grant(*two.other, two.theirs.id, kvx::kMayRead, 0.05);
  CHECK(sight->look(ref.slot, ref.generation) == Code::kOk);
  CHECK(sight->look(ref.slot, ref.generation + 1) == Code::kStale);
  CHECK(sight->look(kvx::kLeaseSlots, ref.generation) == Code::kStale);
  usleep(100'000);
  CHECK(sight->look(brief.slot, brief.generation) == Code::kStale);
  CHECK(two.other->revoke(ref.id, 1.0).ok());
  CHECK(sight->look(ref.slot, ref.generation) == Code::kStale);
  // It outlives the agent it was asked of.
  two.one->close(1.0);
  two.one.reset();
  CHECK(sight->look(ref.slot, ref.generation) == Code::kStale);
}

void test_no_sight_over_a_network() {
  Two two(Link::kTcp, kBytes);
  std::shared_ptr<const kvx::PeerSight> sight;
  CHECK(two.one->sight(kOther, &sight).code() == Code::kUnavailable);
}

// What a dead process has left behind says that its leases are live.
void test_a_sight_of_the_dead() {
  int pipes[2];
  CHECK(pipe(pipes) == 0);
  const std::string path = "@kvx-sight-" + std::to_string(getpid());
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    std::unique_ptr<Agent> agent;
    CHECK(Agent::create({}, &agent).ok());
    uint32_t opaque = 0;
    CHECK(agent->add_opaque_region(kBytes, &opaque).ok());
    CHECK(agent->listen_unix(path).ok());
    const auto ref = grant(*agent, opaque, kvx::kMayRead);
    CHECK(write(pipes[1], &ref, sizeof(ref)) == sizeof(ref));
    CHECK(agent->approve(next_event(*agent, EventKind::kOpened).connection, kOther).ok());
    pause();
  }
  kvx::LeaseRef ref;
  CHECK(read(pipes[0], &ref, sizeof(ref)) == sizeof(ref));
  std::unique_ptr<Agent> agent;
  CHECK(Agent::create({}, &agent).ok());
  uint64_t connection = 0;
  CHECK(agent->dial_unix(path, 5.0, &connection).ok());
  CHECK(agent->approve(next_event(*agent, EventKind::kOpened).connection, kOther).ok());
  std::shared_ptr<const kvx::PeerSight> sight;
  for (int turn = 0; turn < 1000 && !agent->sight(kOther, &sight).ok(); ++turn) usleep(5000);
  CHECK(sight->look(ref.slot, ref.generation) == Code::kOk);
  CHECK(kill(child, SIGKILL) == 0);
  CHECK(waitpid(child, nullptr, 0) == child);
  CHECK(sight->look(ref.slot, ref.generation) == Code::kPeerLost);
  agent->close(1.0);
}

}  // namespace

int main() {
  test_a_sight_of_the_dead();  // forks, so before there are threads
  test_numbers();
  test_no_way_touches_them(Link::kPair, Way::kPull);
  test_no_way_touches_them(Link::kUnix, Way::kPull);
  test_no_way_touches_them(Link::kUnix, Way::kStream);
  test_no_way_touches_them(Link::kTcp, Way::kStream);
  test_leases_are_held();
  test_a_sight_of_leases();
  test_no_sight_over_a_network();
}
