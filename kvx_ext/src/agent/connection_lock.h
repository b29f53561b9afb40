// The lock of a connection, and what has to wait until it is given back.
#pragma once

#include <functional>
#include <vector>

#include "agent/connection.h"

namespace kvx {

class Connection::Locked {
 public:
  explicit Locked(Connection& connection)
      : connection_(connection), lock_(connection.mutex_), keep_(connection.weak_from_this()) {}
  ~Locked() {
    // What is put off may put off more, on this connection or another one.
    const std::shared_ptr<Connection> keep = keep_.lock();
    std::vector<std::function<void()>> later = std::move(connection_.later_);
    connection_.later_.clear();
    lock_.unlock();
    for (const auto& action : later) action();
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  Connection& connection_;
  std::unique_lock<std::mutex> lock_;
  std::weak_ptr<Connection> keep_;
};

// What a request says of the blocks [first, first + count) of a transfer of ours.
wire::Request request_for(const RemoteRecord& record, int64_t first, int64_t count,
                          const LeaseRef& lease);

}  // namespace kvx
