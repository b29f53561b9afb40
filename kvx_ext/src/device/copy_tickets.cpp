#include "kvx/copy_tickets.h"

#include <string>
#include <utility>

#include "clock.h"

namespace kvx {

Status CopyTickets::create(Device& device, const CopyOptions& options,
                           std::unique_ptr<CopyTickets>* tickets) {
  std::unique_ptr<CopyTickets> made(new CopyTickets());
  const auto sink = [board = made->board_](std::span<const CopyCompletion> completions) {
    std::lock_guard lock(board->mutex);
    for (const CopyCompletion& completion : completions) {
      board->tickets[completion.token] = completion;
    }
    board->completed += completions.size();
    board->news.notify_all();
  };
  Status status = device.make_copies(options, sink, &made->copies_);
  if (status.ok()) *tickets = std::move(made);
  return status;
}

uint64_t CopyTickets::submit(CopyRequest request) {
  {
    std::lock_guard lock(board_->mutex);
    request.token = ++board_->last_ticket;
    board_->tickets[request.token] = std::nullopt;
  }
  const uint64_t ticket = request.token;
  copies_->submit(std::move(request));
  return ticket;
}

Status CopyTickets::wait(uint64_t ticket, double timeout_s, CopyCompletion* completion) {
  std::unique_lock lock(board_->mutex);
  const auto found = board_->tickets.find(ticket);
  if (found == board_->tickets.end()) {
    return {Code::kUsage, "there is no ticket " + std::to_string(ticket) + " to wait for"};
  }
  // Another thread may have waited for it meanwhile, so it is looked up each time.
  const auto is_over = [&] {
    const auto at = board_->tickets.find(ticket);
    return at == board_->tickets.end() || at->second.has_value();
  };
  if (!board_->news.wait_until(lock, time_after(timeout_s), is_over)) {
    return {Code::kTimeout, "ticket " + std::to_string(ticket) + " is not completed yet"};
  }
  const auto at = board_->tickets.find(ticket);
  if (at == board_->tickets.end()) {
    return {Code::kUsage, "ticket " + std::to_string(ticket) + " was waited for by two threads"};
  }
  *completion = *at->second;
  board_->tickets.erase(at);
  --board_->completed;
  return Status::Ok();
}

std::vector<std::pair<uint64_t, CopyCompletion>> CopyTickets::wait_any(double timeout_s) {
  std::vector<std::pair<uint64_t, CopyCompletion>> taken;
  std::unique_lock lock(board_->mutex);
  (void)board_->news.wait_until(lock, time_after(timeout_s),
                                [&] { return board_->completed > 0 || board_->is_woken; });
  board_->is_woken = false;
  for (auto at = board_->tickets.begin(); at != board_->tickets.end() && board_->completed > 0;) {
    if (!at->second.has_value()) {
      ++at;
      continue;
    }
    taken.emplace_back(at->first, *at->second);
    at = board_->tickets.erase(at);
    --board_->completed;
  }
  return taken;
}

void CopyTickets::wake() {
  std::lock_guard lock(board_->mutex);
  board_->is_woken = true;
  board_->news.notify_all();
}

}  // namespace kvx
