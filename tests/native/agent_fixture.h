// Two agents, connected and approved, with memory each; over any kind of connection.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kvx/agent.h"
#include "kvx/memory.h"

namespace agents {

using kvx::Agent;
using kvx::AgentEvent;
using kvx::Code;
using kvx::Descriptor;
using kvx::EventKind;
using kvx::RemoteJob;
using kvx::RemotePlan;
using kvx::Status;
using kvx::Way;

enum class Link { kPair, kUnix, kTcp };

inline AgentEvent next_event(Agent& agent, EventKind kind) {
  for (int turn = 0; turn < 200; ++turn) {
    for (AgentEvent& event : agent.next_events(1, 0.1)) {
      if (event.kind == kind) return std::move(event);
    }
  }
  CHECK(!"the event came");
  return {};
}

struct Memory {
  std::unique_ptr<kvx::HostRegion> host;
  uint32_t id = 0;

  void create(Agent& agent, int64_t bytes) {
    CHECK(kvx::HostRegion::create(bytes, kvx::RegionKind::kMemfd, -1, &host).ok());
    CHECK(agent.add_region(host->data(), host->bytes(), host->fd(), 0, &id).ok());
  }
  uint8_t* data() const { return host->data(); }
};

inline constexpr double kPatienceS = 30.0;
inline constexpr uint64_t kOther = 7;  // what each calls the other

class Two {
 public:
  explicit Two(Link link, int64_t bytes, kvx::AgentOptions options = {}) {
    options.copy_threads = 2;
    CHECK(Agent::create(options, &one).ok());
    CHECK(Agent::create(options, &other).ok());
    connect(link);
    ours.create(*one, bytes);
    theirs.create(*other, bytes);
    await_regions(link);
  }

  void connect(Link link) {
    if (link == Link::kPair) {
      CHECK(Agent::pair(*one, *other, &at_one, &at_other).ok());
    } else if (link == Link::kTcp) {
      int port = 0;
      CHECK(other->listen_tcp("127.0.0.1", 0, nullptr, &port).ok());
      CHECK(one->dial_tcp("127.0.0.1", port, nullptr, 5.0, &at_one).ok());
    } else {
      static std::atomic<int> number{0};
      const std::string path =
          "@kvx-test-" + std::to_string(getpid()) + "-" + std::to_string(++number);
      CHECK(other->listen_unix(path).ok());
      CHECK(one->dial_unix(path, 5.0, &at_one).ok());
    }
    CHECK(next_event(*one, EventKind::kOpened).connection == at_one);
    at_other = next_event(*other, EventKind::kOpened).connection;
    CHECK(one->approve(at_one, kOther).ok());
    CHECK(other->approve(at_other, kOther).ok());
  }

  // They are announced over the connection, which takes a moment.
  void await_regions(Link link) {
    if (link == Link::kTcp) return;
    CHECK(one->can_pull(kOther, theirs.id, kPatienceS).ok());
    CHECK(other->can_pull(kOther, ours.id, kPatienceS).ok());
  }

  kvx::LeaseRef lease(std::vector<Descriptor> blocks, uint8_t rights, double ttl_s = 60.0) {
    kvx::LeaseRef ref;
    CHECK(other
              ->grant(theirs.id, {.rights = rights, .ttl_s = ttl_s, .blocks = std::move(blocks)},
                      &ref)
              .ok());
    return ref;
  }

  std::shared_ptr<const RemotePlan> plan(std::vector<Descriptor> local,
                                         std::vector<Descriptor> remote,
                                         std::vector<uint32_t> indices) {
    auto made = std::make_shared<RemotePlan>();
    made->region = ours.id;
    made->local = std::move(local);
    made->remote_region = theirs.id;
    made->remote = std::move(remote);
    made->indices = std::move(indices);
    CHECK(kvx::finish_plan(made.get(), ours.host->bytes()).ok());
    return made;
  }

  std::shared_ptr<RemoteJob> submit(bool is_write, Way way, const kvx::LeaseRef& ref,
                                    std::shared_ptr<const RemotePlan> its_plan,
                                    double deadline_s = 10.0, std::vector<uint8_t> note = {}) {
    std::shared_ptr<RemoteJob> job;
    const Status status = one->submit({.is_write = is_write,
                                       .way = way,
                                       .peer = kOther,
                                       .lease = ref,
                                       .plan = std::move(its_plan),
                                       .deadline_s = deadline_s,
                                       .note = std::move(note)},
                                      &job);
    if (!status.ok()) {
      for (const AgentEvent& event : one->next_events(100, 0.0)) {
        const std::string text(event.payload.begin(), event.payload.end());
        std::fprintf(stderr, "event %d: %s\n", static_cast<int>(event.kind), text.c_str());
      }
      std::fprintf(stderr, "%s\n", status.message().c_str());
    }
    CHECK(status.ok());
    return job;
  }

  // Agents go first: until they are closed, memory that is registered may be touched.
  Memory ours;
  Memory theirs;
  std::unique_ptr<Agent> one;
  std::unique_ptr<Agent> other;
  uint64_t at_one = 0;
  uint64_t at_other = 0;
};

inline std::vector<Descriptor> rows(int64_t first, int64_t count, int64_t bytes) {
  std::vector<Descriptor> blocks;
  for (int64_t i = 0; i < count; ++i) blocks.push_back({(first + i) * bytes, 0, 1, bytes});
  return blocks;
}

inline std::vector<uint32_t> all_of(size_t count) {
  std::vector<uint32_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = static_cast<uint32_t>(i);
  return indices;
}

inline void fill(std::mt19937_64& random, uint8_t* data, int64_t bytes) {
  for (int64_t at = 0; at + 8 <= bytes; at += 8) {
    const uint64_t word = random();
    std::memcpy(data + at, &word, 8);
  }
}

}  // namespace agents
