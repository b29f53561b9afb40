// Two regions, a table of leases over one of them, and its page as a peer sees it.
#pragma once

#include <unistd.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "agent/puller.h"
#include "check.h"
#include "kvx/checksum.h"
#include "kvx/lease_table.h"

namespace pulls {

using kvx::Code;
using kvx::Descriptor;
using kvx::LeaseRef;

inline std::vector<uint8_t> random_bytes(std::mt19937_64& random, int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

struct Bed {
  Bed(std::vector<uint8_t> source_bytes, std::vector<uint8_t> target_bytes)
      : source(std::move(source_bytes)), target(std::move(target_bytes)) {
    uint32_t id = 0;
    CHECK(regions.add(source.data(), static_cast<int64_t>(source.size()), -1, 0, &id).ok());
    source_region = regions.hold(id);
    CHECK(regions.add(target.data(), static_cast<int64_t>(target.size()), -1, 0, &id).ok());
    target_region = regions.hold(id);
    CHECK(kvx::LeaseTable::create(&leases).ok());
    CHECK(kvx::LeaseView::map(dup(leases->fd()), &view).ok());
  }

  LeaseRef grant(std::vector<Descriptor> blocks, double ttl_s = 1000) {
    LeaseRef ref;
    kvx::LeaseTerms terms;
    terms.ttl_s = ttl_s;
    terms.blocks = std::move(blocks);
    CHECK(leases->grant(source_region.again(), std::move(terms), &ref).ok());
    return ref;
  }
  LeaseRef grant_all() { return grant({{0, 0, 1, static_cast<int64_t>(source.size())}}); }

  kvx::RemotePlan plan(std::vector<Descriptor> local, std::vector<Descriptor> remote) const {
    kvx::RemotePlan made;
    made.local = std::move(local);
    made.remote = std::move(remote);
    return made;
  }

  std::shared_ptr<kvx::PullTask> task(kvx::RemotePlan unfinished, const LeaseRef& ref,
                                      double deadline_s = 1000) const {
    auto shared = std::make_shared<kvx::RemotePlan>(std::move(unfinished));
    CHECK(kvx::finish_plan(shared.get(), target_region->bytes()).ok());
    auto made = std::make_shared<kvx::PullTask>();
    made->record = std::make_shared<kvx::RemoteRecord>(1, false, std::move(shared),
                                                       kvx::time_after(deadline_s));
    made->record->region = target_region.again();
    made->source.mapped = source.data();
    made->leases = view;
    made->lease_slot = ref.slot;
    made->lease_generation = ref.generation;
    return made;
  }

  std::vector<uint8_t> source;
  std::vector<uint8_t> target;
  kvx::RegionTable regions;
  kvx::RegionHold source_region;
  kvx::RegionHold target_region;
  std::unique_ptr<kvx::LeaseTable> leases;
  std::shared_ptr<const kvx::LeaseView> view;
};

// The canonical bytes of a block, one row after the other.
inline std::vector<uint8_t> canonical(const std::vector<uint8_t>& memory, const Descriptor& block) {
  std::vector<uint8_t> bytes;
  for (int64_t row = 0; row < block.count; ++row) {
    const auto begin = memory.begin() + block.offset + row * block.stride;
    bytes.insert(bytes.end(), begin, begin + block.bytes);
  }
  return bytes;
}

inline void put(std::vector<uint8_t>* memory, const Descriptor& block,
                const std::vector<uint8_t>& bytes) {
  size_t at = 0;
  for (int64_t row = 0; row < block.count; ++row) {
    for (int64_t i = 0; i < block.bytes; ++i) {
      (*memory)[static_cast<size_t>(block.offset + row * block.stride + i)] = bytes[at++];
    }
  }
}

inline uint64_t checksum_of(const std::vector<uint8_t>& bytes, const uint8_t* key) {
  const uint64_t seed = kvx::block_seed(key, bytes.size());
  return kvx::checksum_kernels().back().update(seed, bytes.data(), bytes.size());
}

}  // namespace pulls
