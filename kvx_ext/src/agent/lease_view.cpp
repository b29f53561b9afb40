#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "agent/lease_word.h"
#include "kvx/lease_table.h"

namespace kvx {

namespace {

// Without these seals its owner could take the page away while we look at it (SIGBUS).
Status check_page(int fd) {
  const int seals = fcntl(fd, F_GET_SEALS);
  const bool is_sealed = seals >= 0 && (seals & F_SEAL_SHRINK) != 0 &&
                         (seals & (F_SEAL_FUTURE_WRITE | F_SEAL_WRITE)) != 0;
  if (!is_sealed) return {Code::kUsage, "the peer's page of leases is not a sealed memfd"};
  struct stat facts{};
  if (fstat(fd, &facts) != 0 || facts.st_size != kLeasePageBytes) {
    return {Code::kUsage, "the peer's page of leases has " + std::to_string(facts.st_size) +
                              " bytes, not " + std::to_string(kLeasePageBytes)};
  }
  return Status::Ok();
}

}  // namespace

Status LeaseView::map(int fd, std::shared_ptr<const LeaseView>* view) {
  Status status = check_page(fd);
  void* mapped = MAP_FAILED;
  if (status.ok()) {
    mapped = mmap(nullptr, kLeasePageBytes, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
      const int error = errno;
      status = {Code::kUnavailable,
                std::string("mmap of the peer's page of leases: ") + std::strerror(error), error};
    }
  }
  if (fd >= 0) close(fd);
  if (!status.ok()) return status;
  std::shared_ptr<LeaseView> made(new LeaseView());
  made->words_ = static_cast<const LeaseWord*>(mapped);
  *view = std::move(made);
  return Status::Ok();
}

LeaseView::~LeaseView() {
  if (words_ != nullptr) munmap(const_cast<LeaseWord*>(words_), kLeasePageBytes);
}

bool LeaseView::is_live(uint32_t slot, uint64_t generation) const {
  if (slot >= kLeaseSlots || generation == 0) return false;
  return is_word_live(words_[slot], generation);
}

}  // namespace kvx
