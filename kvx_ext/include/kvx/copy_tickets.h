// Copies that the caller waits for, one by one or any of them; a tier has a sink instead.
//
//   std::unique_ptr<CopyTickets> copies;
//   Status status = CopyTickets::create(*device, {}, &copies);
//   const uint64_t ticket = copies->submit({.direction = direction, .runs = runs});
//   CopyCompletion completion;
//   status = copies->wait(ticket, 1.0, &completion);
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "kvx/device.h"

namespace kvx {

// Thread-safe, but for close(), which one thread calls once.
class CopyTickets {
 public:
  static Status create(Device& device, const CopyOptions& options,
                       std::unique_ptr<CopyTickets>* tickets);
  CopyTickets(const CopyTickets&) = delete;
  CopyTickets& operator=(const CopyTickets&) = delete;

  // The request's own token is not used. Tickets count from 1.
  uint64_t submit(CopyRequest request);
  // kTimeout: not completed yet, the ticket stays good. kUsage: there is no such ticket, or it was
  // waited for already.
  Status wait(uint64_t ticket, double timeout_s, CopyCompletion* completion);
  // Waits until any have completed, and takes those: (ticket, completion) each. None when time was
  // up or somebody called wake(). For a single reader, who calls wait() for none of them.
  std::vector<std::pair<uint64_t, CopyCompletion>> wait_any(double timeout_s);
  void wake();  // makes one wait_any() return
  void cancel(uint64_t ticket) { copies_->cancel(ticket); }
  CopyStats stats() const { return copies_->stats(); }
  int64_t close(double timeout_s) { return copies_->close(timeout_s); }

 private:
  struct Board {
    std::mutex mutex;
    std::condition_variable news;
    uint64_t last_ticket = 0;                                   // mutex
    std::map<uint64_t, std::optional<CopyCompletion>> tickets;  // mutex; until waited for
    size_t completed = 0;                                       // mutex; of them
    bool is_woken = false;                                      // mutex
  };

  CopyTickets() = default;

  // Shared with the sink, which threads that close() abandoned may hold on to.
  const std::shared_ptr<Board> board_ = std::make_shared<Board>();
  std::unique_ptr<CopyBackend> copies_;
};

}  // namespace kvx
