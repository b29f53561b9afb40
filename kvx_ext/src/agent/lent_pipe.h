// Memory handed to a socket without a copy: vmsplice into a pipe, splice out of it.
//
// The kernel keeps references to the pages; their bytes are read when the other side takes them, on
// this host even later than they left here. So whoever lends keeps them as they are until it knows
// that they were taken; a receiver that got others finds that the checksum does not fit.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>

#include "agent/stream.h"

namespace kvx {

class LentPipe {
 public:
  // Bytes of `source` that are in the socket now, or a negative errno; -EAGAIN: it is full. The
  // next call continues behind them. -ENOTSUP: the kernel does not offer this here.
  ssize_t send(int socket, std::span<const iovec> source);
  // Forgets what was lent and is not in the socket yet.
  void drop();

 private:
  bool open();

  UniqueFd in_;
  UniqueFd out_;
  size_t held_ = 0;  // bytes in the pipe: the first ones of the next call's source
};

}  // namespace kvx
