// Regions and leases: against a model in a dictionary, over threads, and against hostile memfds.
// Usage: test_lease_table [seed]
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "kvx/checksum.h"
#include "kvx/lease_table.h"
#include "kvx/memory.h"

namespace {

using kvx::Code;
using kvx::LeaseRef;
using kvx::LeaseTable;
using kvx::LeaseUse;
using kvx::LeaseView;
using kvx::RegionHold;
using kvx::RegionTable;

constexpr int64_t kRegionBytes = 4096;
constexpr double kLongS = 1000.0;
constexpr double kPastS = 1e-9;  // over before anybody looks

struct Bed {
  Bed() {
    CHECK(regions.add(memory.data(), kRegionBytes, -1, 0, &region).ok());
    CHECK(LeaseTable::create(&leases).ok());
    CHECK(LeaseView::map(dup(leases->fd()), &view).ok());
  }

  LeaseRef grant(double ttl_s = kLongS, uint64_t peer = kvx::kAnyPeer,
                 uint8_t rights = kvx::kMayRead) {
    LeaseRef ref;
    CHECK(leases->grant(regions.hold(region), terms(ttl_s, peer, rights), &ref).ok());
    return ref;
  }

  static kvx::LeaseTerms terms(double ttl_s, uint64_t peer, uint8_t rights) {
    return {rights, peer, ttl_s, {{0, 0, 1, 100}, {100, 0, 1, 28}}, {}, {}};
  }

  std::vector<uint8_t> memory = std::vector<uint8_t>(kRegionBytes);
  RegionTable regions;
  uint32_t region = 0;
  std::unique_ptr<LeaseTable> leases;
  std::shared_ptr<const LeaseView> view;
};

void test_sealed_regions_cannot_be_written_by_others() {
  std::unique_ptr<kvx::HostRegion> host;
  CHECK(kvx::HostRegion::create(8192, kvx::RegionKind::kMemfd, -1, &host).ok());
  RegionTable regions;
  uint32_t id = 0;
  CHECK(regions.add(host->data(), host->bytes(), host->fd(), 0, &id).ok());
  // Again, as another region of the same memfd: it is sealed already.
  uint32_t other = 0;
  CHECK(regions.add(host->data() + 100, 200, host->fd(), 100, &other).ok() && other != id);
  CHECK(regions.bytes() == 8392 && regions.all().size() == 2);
  const int fd = host->fd();
  CHECK(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
  CHECK(errno == EPERM);
  CHECK(pwrite(fd, "x", 1, 0) < 0 && ftruncate(fd, 0) < 0 && ftruncate(fd, 1 << 20) < 0);
  void* reading = mmap(nullptr, 8192, PROT_READ, MAP_SHARED, fd, 0);
  CHECK(reading != MAP_FAILED);
  CHECK(mprotect(reading, 8192, PROT_READ | PROT_WRITE) != 0 && errno == EACCES);
  host->data()[5000] = 42;  // the owner's own mapping goes on
  CHECK(static_cast<uint8_t*>(reading)[5000] == 42);
  munmap(reading, 8192);
}

void test_what_cannot_be_a_region() {
  RegionTable regions;
  uint32_t id = 0;
  std::vector<uint8_t> memory(100);
  CHECK(regions.add(nullptr, 100, -1, 0, &id).code() == Code::kUsage);
  CHECK(regions.add(memory.data(), 0, -1, 0, &id).code() == Code::kUsage);
  std::FILE* file = std::tmpfile();
  CHECK(file != nullptr && ftruncate(fileno(file), 4096) == 0);
  CHECK(regions.add(memory.data(), 100, fileno(file), 0, &id).code() == Code::kUnavailable);
  std::fclose(file);
  const int unsealable = memfd_create("unsealable", MFD_CLOEXEC);
  CHECK(ftruncate(unsealable, 4096) == 0);
  CHECK(regions.add(memory.data(), 100, unsealable, 0, &id).code() == Code::kUnavailable);
  close(unsealable);
  CHECK(regions.add(memory.data(), 100, unsealable, 0, &id).code() == Code::kUsage);
  const int small = memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(ftruncate(small, 4096) == 0);
  for (const auto& [bytes, offset] : {std::pair{4097L, 0L}, {1L, 4096L}, {1L, -1L}, {1L, 5000L}}) {
    CHECK(regions.add(memory.data(), bytes, small, offset, &id).code() == Code::kUsage);
  }
  close(small);
  CHECK(regions.all().empty() && !regions.hold(1) && !regions.hold(0));
  CHECK(regions.remove(1, 0).code() == Code::kUsage);
}

void test_removal_waits_for_holds() {
  Bed bed;
  RegionHold hold = bed.regions.hold(bed.region);
  CHECK(hold && hold->bytes() == kRegionBytes && hold->base() == bed.memory.data());
  CHECK(bed.regions.remove(bed.region, 0.01).code() == Code::kTimeout);
  CHECK(!bed.regions.hold(bed.region) && bed.regions.all().empty());
  RegionHold second = hold.again();  // allowed: the first one keeps it
  CHECK(second);
  hold = RegionHold();
  CHECK(bed.regions.remove(bed.region, 0.01).code() == Code::kTimeout);
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    RegionHold last = std::move(second);
  });
  CHECK(bed.regions.remove(bed.region, 30.0).ok());
  late.join();
  CHECK(bed.regions.bytes() == 0);
  CHECK(!RegionHold().again());
}

void test_leases_hold_their_region() {
  Bed bed;
  const LeaseRef ref = bed.grant();
  CHECK(bed.regions.remove(bed.region, 0).code() == Code::kTimeout);
  LeaseUse use;
  CHECK(bed.leases->use(ref, 5, kvx::kMayRead, &use).ok());
  CHECK(bed.leases->revoke(ref.id, 0).code() == Code::kTimeout);
  CHECK(bed.regions.remove(bed.region, 0).code() == Code::kTimeout);
  use.release();
  CHECK(bed.regions.remove(bed.region, 0).ok());
  LeaseRef none;
  kvx::LeaseTerms terms = Bed::terms(1.0, 0, kvx::kMayRead);
  CHECK(bed.leases->grant(bed.regions.hold(bed.region), terms, &none).code() == Code::kUsage);
}

void test_refused_terms() {
  Bed bed;
  auto is_refused = [&](auto change) {
    kvx::LeaseTerms terms = Bed::terms(1.0, kvx::kAnyPeer, kvx::kMayRead);
    change(terms);
    LeaseRef ref;
    return bed.leases->grant(bed.regions.hold(bed.region), terms, &ref).code() == Code::kUsage;
  };
  CHECK(!is_refused([](kvx::LeaseTerms&) {}));
  CHECK(is_refused([](kvx::LeaseTerms& terms) { terms.blocks.clear(); }));
  CHECK(is_refused([](kvx::LeaseTerms& terms) { terms.blocks[1].offset = kRegionBytes - 27; }));
  CHECK(is_refused([](kvx::LeaseTerms& terms) { terms.checksums = {1}; }));
  CHECK(is_refused([](kvx::LeaseTerms& terms) { terms.keys.resize(kvx::kKeyBytes); }));
  CHECK(is_refused([](kvx::LeaseTerms& terms) { terms.rights = 0; }));
  CHECK(is_refused([](kvx::LeaseTerms& terms) { terms.rights = 8; }));
  for (const double ttl_s : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(is_refused([ttl_s](kvx::LeaseTerms& terms) { terms.ttl_s = ttl_s; }));
  }
  CHECK(bed.leases->live() == 1 && bed.leases->bytes() == 128);
}

void test_views_refuse_other_pages() {
  Bed bed;
  std::shared_ptr<const LeaseView> view;
  auto is_refused = [&](int fd) {
    const bool is = LeaseView::map(fd, &view).code() == Code::kUsage && view == nullptr;
    return is && fcntl(fd, F_GETFD) < 0;  // taken all the same
  };
  auto page = [](int64_t bytes, int seals) {
    const int fd = memfd_create("page", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(ftruncate(fd, bytes) == 0 && fcntl(fd, F_ADD_SEALS, seals) == 0);
    return fd;
  };
  constexpr int64_t kBytes = int64_t{kvx::kLeaseSlots} * 16;
  CHECK(is_refused(-1));
  CHECK(is_refused(open("/dev/null", O_RDONLY | O_CLOEXEC)));
  CHECK(is_refused(page(kBytes, 0)));
  CHECK(is_refused(page(kBytes, F_SEAL_SHRINK)));
  CHECK(is_refused(page(kBytes, F_SEAL_FUTURE_WRITE)));
  CHECK(is_refused(page(kBytes - 4096, F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE)));
  CHECK(LeaseView::map(page(kBytes, F_SEAL_SHRINK | F_SEAL_WRITE), &view).ok());
  CHECK(!view->is_live(0, 0) && !view->is_live(kvx::kLeaseSlots, 1));
  // Nobody but the table writes its page.
  CHECK(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, bed.leases->fd(), 0) ==
        MAP_FAILED);
  CHECK(pwrite(bed.leases->fd(), "x", 1, 0) < 0 && ftruncate(bed.leases->fd(), 0) < 0);
}

void test_expiry_and_renewal() {
  Bed bed;
  const LeaseRef ref = bed.grant(0.05);
  const LeaseRef renewed = bed.grant(0.05);
  CHECK(bed.leases->renew(renewed.id, kLongS).ok() && bed.leases->renew(renewed.id, 0.001).ok());
  LeaseUse use;
  CHECK(bed.view->is_live(ref.slot, ref.generation));
  CHECK(bed.leases->use(ref, 1, kvx::kMayRead, &use).ok() && use.is_live());
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  CHECK(!bed.view->is_live(ref.slot, ref.generation) && !use.is_live());
  CHECK(bed.view->is_live(renewed.slot, renewed.generation));
  LeaseUse late;
  CHECK(bed.leases->use(ref, 1, kvx::kMayRead, &late).code() == Code::kStale && !late);
  CHECK(bed.leases->renew(ref.id, kLongS).code() == Code::kStale);
  CHECK(bed.leases->live() == 1 && bed.leases->in_use() == 1);
  bed.leases->sweep();
  CHECK(bed.leases->in_use() == 1 && !use.is_live());  // gone only with its use
  use.release();
  CHECK(bed.leases->revoke(ref.id, 0).ok() && bed.leases->in_use() == 0);
}

void test_slots_run_out_and_come_back() {
  Bed bed;
  std::vector<LeaseRef> refs;
  for (uint32_t i = 0; i < kvx::kLeaseSlots; ++i) refs.push_back(bed.grant());
  std::set<uint32_t> slots;
  for (const LeaseRef& ref : refs) slots.insert(ref.slot);
  CHECK(slots.size() == kvx::kLeaseSlots && *slots.rbegin() == kvx::kLeaseSlots - 1);
  LeaseRef none;
  kvx::LeaseTerms terms = Bed::terms(1.0, 0, kvx::kMayRead);
  CHECK(bed.leases->grant(bed.regions.hold(bed.region), terms, &none).code() == Code::kCapacity);
  CHECK(bed.leases->revoke(refs[5].id, 0).ok());
  const LeaseRef again = bed.grant(kPastS);
  CHECK(again.slot == refs[5].slot && again.generation > refs.back().generation);
  CHECK(!bed.view->is_live(refs[5].slot, refs[5].generation));
  CHECK(bed.grant().slot == again.slot);  // expired ones make room
}

// What a table ought to know.
struct Model {
  struct Entry {
    LeaseRef ref;
    uint64_t peer;
    uint8_t rights;
    bool is_live;
    std::vector<LeaseUse> uses;
  };
  std::map<uint64_t, Entry> leases;  // granted and never ended, or ended and used
  std::vector<LeaseRef> dead;

  void end(uint64_t id) {
    Entry& entry = leases.at(id);
    entry.is_live = false;
    if (!entry.uses.empty()) return;
    dead.push_back(entry.ref);
    leases.erase(id);
  }
};

void check_model(const Bed& bed, const Model& model) {
  int64_t live = 0;
  int64_t uses = 0;
  for (const auto& [id, entry] : model.leases) {
    live += entry.is_live ? 1 : 0;
    uses += static_cast<int64_t>(entry.uses.size());
    CHECK(bed.leases->is_live(entry.ref) == entry.is_live);
    CHECK(bed.view->is_live(entry.ref.slot, entry.ref.generation) == entry.is_live);
    for (const LeaseUse& use : entry.uses) CHECK(use.is_live() == entry.is_live);
  }
  CHECK(bed.leases->live() == live && bed.leases->in_use() == uses);
  CHECK(bed.leases->bytes() == live * 128);
  for (size_t i = model.dead.size() - std::min<size_t>(model.dead.size(), 20);
       i < model.dead.size(); ++i) {
    CHECK(!bed.view->is_live(model.dead[i].slot, model.dead[i].generation));
  }
}

void try_use(Bed& bed, Model& model, Model::Entry& entry, std::mt19937_64& random) {
  LeaseRef ref = entry.ref;
  const uint64_t peer = random() % 3 + 1;
  const auto rights = static_cast<uint8_t>(random() % 4);
  if (random() % 8 == 0) ref.generation += random() % 3 - 1;
  if (random() % 8 == 0) ref.slot ^= random() % 2;
  if (random() % 8 == 0 && !model.dead.empty()) ref = model.dead[random() % model.dead.size()];
  const bool is_same = ref.id == entry.ref.id && ref.slot == entry.ref.slot &&
                       ref.generation == entry.ref.generation;
  const bool is_peer = entry.peer == kvx::kAnyPeer || entry.peer == peer;
  const bool is_right = rights != 0 && (entry.rights & rights) == rights;
  Code expected = Code::kOk;
  if (!is_same || !entry.is_live) {
    expected = Code::kStale;
  } else if (!is_peer || !is_right) {
    expected = Code::kUsage;
  }
  LeaseUse use;
  CHECK(bed.leases->use(ref, peer, rights, &use).code() == expected);
  CHECK(static_cast<bool>(use) == (expected == Code::kOk));
  if (use) entry.uses.push_back(std::move(use));
}

void step(Bed& bed, Model& model, std::set<uint64_t>& generations, std::mt19937_64& random) {
  const uint64_t choice = random() % 16;
  if (model.leases.empty() || choice < 4) {
    const bool is_past = random() % 4 == 0;
    const uint64_t peer = random() % 4;
    const auto rights = static_cast<uint8_t>(1 + random() % 3);
    const LeaseRef ref = bed.grant(is_past ? kPastS : kLongS, peer, rights);
    CHECK(ref.id != 0 && ref.generation != 0 && generations.insert(ref.generation).second);
    model.leases[ref.id] = {ref, peer, rights, !is_past, {}};
    return;
  }
  auto place = model.leases.begin();
  std::advance(place, random() % model.leases.size());
  Model::Entry& entry = place->second;
  if (choice < 8) {
    try_use(bed, model, entry, random);
  } else if (choice < 11) {
    if (entry.uses.empty()) return;
    entry.uses.pop_back();
    // One that ended only waited for this. An expired one waits for a sweep, which may come now.
    if (entry.uses.empty() && !entry.is_live) {
      bed.leases->sweep();
      for (auto at = model.leases.begin(); at != model.leases.end();) {
        const uint64_t id = at++->first;
        if (!model.leases.at(id).is_live) model.end(id);
      }
    }
  } else if (choice < 13) {
    const bool is_used = !entry.uses.empty();
    CHECK(bed.leases->revoke(entry.ref.id, 0).code() == (is_used ? Code::kTimeout : Code::kOk));
    model.end(entry.ref.id);
  } else if (choice < 14) {
    CHECK(bed.leases->renew(entry.ref.id, kLongS).ok() == entry.is_live);
  } else if (choice < 15) {
    const uint64_t peer = random() % 4;
    bed.leases->revoke_peer(peer);
    for (auto at = model.leases.begin(); at != model.leases.end() && peer != kvx::kAnyPeer;) {
      const uint64_t id = at++->first;
      if (model.leases.at(id).peer == peer) model.end(id);
    }
  } else if (!model.dead.empty()) {
    const LeaseRef& ref = model.dead[random() % model.dead.size()];
    CHECK(bed.leases->revoke(ref.id, 0).ok());
    CHECK(bed.leases->renew(ref.id, kLongS).code() == Code::kStale);
  }
}

void test_against_model(std::mt19937_64& random) {
  Bed bed;
  Model model;
  std::set<uint64_t> generations;
  for (int i = 0; i < 30'000; ++i) {
    step(bed, model, generations, random);
    if (i % 8 == 0) check_model(bed, model);
  }
  CHECK(model.dead.size() > 1000);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  test_sealed_regions_cannot_be_written_by_others();
  test_what_cannot_be_a_region();
  test_removal_waits_for_holds();
  test_leases_hold_their_region();
  test_refused_terms();
  test_views_refuse_other_pages();
  test_expiry_and_renewal();
  test_slots_run_out_and_come_back();
  test_against_model(random);
  std::puts("lease table: ok");
  return 0;
}
