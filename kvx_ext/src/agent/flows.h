// The two ends of a transfer on a connection: what is received into, what is sent from.
//
// Neither knows of sockets. A sink takes the canonical bytes of its blocks in order, checksums them
// as they come and settles each block with the trailer that follows it; a source gives them, with
// trailers. Both ask before every touch whether they still may.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "agent/remote_job.h"
#include "kvx/checksum.h"
#include "kvx/descriptor.h"
#include "kvx/lease_table.h"
#include "kvx/wire.h"

namespace kvx {

// Overwrites a block that must not be mistaken for KV; see copy.h.
void poison_rows(uint8_t* base, const Descriptor& block);

// The key of a block within `keys` (kKeyBytes each); of zeros where there are none.
const uint8_t* key_at(std::span<const uint8_t> keys, int64_t block);

class Sink {
 public:
  virtual ~Sink() = default;

  int64_t position() const { return position_; }
  int64_t total() const { return total_; }
  bool is_complete() const { return position_ == total_; }

  // Where the next bytes go, `bytes_max` at most. REQUIRES: may_write().
  size_t rows(std::span<iovec> target, int64_t bytes_max) const;
  // These many bytes came: into rows(), or, spoilt, nowhere.
  void advance(int64_t bytes, bool is_spoilt);
  // Blocks that ended and wait for their trailers.
  size_t waiting() const { return ended_.size() - settled_; }
  // REQUIRES: waiting() > 0.
  void settle_next(const wire::Trailer& trailer);

  virtual bool may_write() const = 0;

 protected:
  Sink(uint8_t* base, std::span<const Descriptor> blocks, std::span<const uint8_t> keys);

  // One block, in order. `is_intact`: its bytes are what the sender checksummed.
  virtual void settle(int64_t block, uint64_t checksum, Code code) = 0;
  // What the block must have; false when nobody knew beforehand.
  virtual bool expects(int64_t block, uint64_t* checksum) const = 0;

  uint8_t* base() const { return base_; }
  std::span<const Descriptor> blocks() const { return blocks_; }

 private:
  struct Ended {
    int64_t block = 0;
    uint64_t checksum = 0;
    bool is_spoilt = false;
  };

  uint8_t* const base_;
  const std::span<const Descriptor> blocks_;
  const std::span<const uint8_t> keys_;
  const int64_t total_;
  RowCursor cursor_;
  int64_t position_ = 0;
  uint64_t state_ = 0;
  bool is_spoilt_ = false;  // the block at the cursor
  std::vector<Ended> ended_;
  size_t settled_ = 0;
};

// A transfer of so many bytes is confirmed by its receiver; smaller ones are not worth a frame.
inline constexpr int64_t kConfirmedBytes = 256 << 10;

class Source {
 public:
  virtual ~Source() = default;

  uint64_t id() const { return id_; }
  bool is_to_initiator() const { return is_to_initiator_; }
  bool is_at_end() const { return cursor_.is_at_end(); }
  // Blocks, from the first one on, whose last byte is in a piece.
  int64_t ended_blocks() const { return cursor_.block(); }

  // Makes the next piece: its rows, and how many blocks end in it. REQUIRES: not at the end.
  wire::Piece next(int64_t bytes_max, std::vector<iovec>* rows);
  // One for each block that ended in the last piece, looked at after it was sent.
  std::vector<wire::Trailer> trailers();

  // kOk while the bytes may be read; else why no more.
  virtual Code may_read() const = 0;
  // Whether the memory stays as it is until the receiver has confirmed: it may be lent.
  bool is_kept() const { return is_kept_; }

 protected:
  Source(uint64_t id, bool is_to_initiator, const uint8_t* base, std::span<const Descriptor> blocks,
         std::span<const uint8_t> keys, bool computes);

  // A checksum known beforehand; false when there is none.
  virtual bool knows(int64_t block, uint64_t* checksum) const = 0;

 private:
  const uint64_t id_;
  const bool is_to_initiator_;
  const uint8_t* const base_;
  const std::span<const Descriptor> blocks_;
  const std::span<const uint8_t> keys_;
  const bool computes_;  // checksums, where they are not known
  RowCursor cursor_;
  int64_t position_ = 0;
  uint64_t state_ = 0;
  const bool is_kept_;
  std::vector<uint64_t> ended_;
};

// The blocks of a lease that a request names. kUsage: it names what the lease does not cover.
struct NamedBlocks {
  std::vector<Descriptor> blocks;
  std::vector<uint8_t> keys;
  std::vector<uint64_t> checksums;
};
Status resolve(const Lease& lease, const wire::Request& request, NamedBlocks* named);

}  // namespace kvx
