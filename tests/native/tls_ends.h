// Two ends of a connection that are driven as an agent drives them: by poll, and by what the
// streams say they wait for. A connection that stands still ends the test.
#pragma once

#include <poll.h>

#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "agent/tls.h"
#include "check.h"
#include "stream_pairs.h"

namespace kvx {

struct End {
  std::unique_ptr<Stream> stream;
  std::vector<uint8_t> out;  // to be sent
  size_t sent = 0;
  std::vector<uint8_t> in;  // received
  ssize_t error = 0;        // negative errno of what failed
  bool is_closed = false;   // by the other side, in order
  bool is_simple = false;   // waits for its own bytes only, not for what the stream has left

  bool is_over() const { return error != 0 || is_closed; }
  std::string failure() const { return stream->failure(); }
};

// Some of what is to be sent, in parts of random sizes, some of them empty.
inline bool send_some(End& end, std::mt19937_64& random) {
  std::vector<iovec> parts;
  size_t at = end.sent;
  const size_t largest = random() % 3 == 0 ? 100000 : 300;
  while (at < end.out.size() && parts.size() < 40) {
    const size_t bytes = std::min<size_t>(random() % largest, end.out.size() - at);
    parts.push_back(part_of(end.out.data() + at, bytes));
    at += bytes;
  }
  if (at == end.sent) return true;  // all of them empty: once more
  const ssize_t count = end.stream->send(parts, -1);
  CHECK(count != 0);
  if (count > 0) end.sent += static_cast<size_t>(count);
  if (count < 0 && count != -EAGAIN) end.error = count;
  return count > 0;
}

inline bool receive_some(End& end, std::mt19937_64& random) {
  uint8_t buffer[40000];
  const iovec parts[] = {part_of(buffer, 1 + random() % 20000),
                         part_of(buffer + 20000, random() % 20000)};
  const ssize_t count = end.stream->receive(parts, nullptr);
  if (count == 0) end.is_closed = true;
  if (count < 0 && count != -EAGAIN) end.error = count;
  if (count <= 0) return false;
  const size_t first = std::min<size_t>(static_cast<size_t>(count), parts[0].iov_len);
  end.in.insert(end.in.end(), buffer, buffer + first);
  end.in.insert(end.in.end(), buffer + 20000, buffer + 20000 + static_cast<size_t>(count) - first);
  return true;
}

inline bool is_waiting_to_write(const End& end) {
  const bool has_more = end.sent < end.out.size() && !end.stream->wants_read_to_send();
  return has_more || (!end.is_simple && end.stream->wants_write_to_receive());
}

inline pollfd wish_of(const End& end) {
  return {.fd = end.is_over() ? -1 : end.stream->fd(),
          .events = static_cast<short>(POLLIN | (is_waiting_to_write(end) ? POLLOUT : 0)),
          .revents = 0};
}

// Calls what poll and the stream gave a reason to call, and nothing else.
inline bool step(End& end, short ready, std::mt19937_64& random) {
  const bool is_readable = (ready & (POLLIN | POLLHUP | POLLERR)) != 0;
  const bool is_writable = (ready & POLLOUT) != 0;
  const bool was_owing = !end.is_simple && end.stream->wants_write_to_receive();
  bool has_moved = false;
  if (end.sent < end.out.size() && (end.stream->wants_read_to_send() ? is_readable : is_writable)) {
    has_moved |= send_some(end, random);
  }
  if (!end.is_over() && (is_readable || end.stream->has_buffered() || (is_writable && was_owing))) {
    has_moved |= receive_some(end, random);
  }
  return has_moved;
}

// Drives all until `is_enough`.
inline void drive(std::span<End* const> ends, std::mt19937_64& random,
                  const std::function<bool()>& is_enough) {
  int idle = 0;
  while (!is_enough()) {
    std::vector<pollfd> wishes;
    bool has_buffered = false;
    for (End* end : ends) {
      wishes.push_back(wish_of(*end));
      has_buffered |= !end->is_over() && end->stream->has_buffered();
    }
    const int ready = poll(wishes.data(), wishes.size(), has_buffered ? 0 : kPatienceMs);
    CHECK(ready > 0 || has_buffered);  // else it hangs
    bool has_moved = false;
    for (size_t i = 0; i < ends.size(); ++i) {
      if (!ends[i]->is_over()) has_moved |= step(*ends[i], wishes[i].revents, random);
    }
    idle = has_moved ? 0 : idle + 1;
    CHECK(idle < 10000);  // else it turns round and round
  }
}

inline std::unique_ptr<Stream> tls_end(UniqueFd fd, const std::shared_ptr<TlsContext>& context,
                                       bool is_server, const std::string& host) {
  std::unique_ptr<Stream> made;
  const Status status = make_tls_stream(std::move(fd), context, is_server, host, &made);
  CHECK(status.ok() && made->is_encrypted());
  return made;
}

}  // namespace kvx
