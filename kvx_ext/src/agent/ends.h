// The four flows of a connection: what we read, what we write, and the same of the peer.
#pragma once

#include <memory>
#include <vector>

#include "agent/flows.h"
#include "agent/remote_job.h"
#include "clock.h"

namespace kvx {

// The blocks [first, first + count) of a read of ours.
class ReadSink : public Sink {
 public:
  ReadSink(std::shared_ptr<RemoteRecord> record, int64_t first, int64_t count);

  bool may_write() const override { return !record_->is_ending(); }
  const std::shared_ptr<RemoteRecord>& record() const { return record_; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t take_settled() { return std::exchange(settled_, 0); }

 protected:
  void settle(int64_t block, uint64_t checksum, Code code) override;
  bool expects(int64_t block, uint64_t* checksum) const override;

 private:
  const std::shared_ptr<RemoteRecord> record_;
  const int64_t first_;
  const int64_t count_;
  int64_t settled_ = 0;
};

// The blocks [first, first + count) of a write of ours.
class WriteSource : public Source {
 public:
  WriteSource(std::shared_ptr<RemoteRecord> record, uint64_t wire_id, int64_t first, int64_t count);
  Code may_read() const override;

 protected:
  bool knows(int64_t block, uint64_t* checksum) const override;

 private:
  const std::shared_ptr<RemoteRecord> record_;
  const int64_t first_;
};

// What both sides of a peer's request need, made before the flow that spans it.
struct Granted {
  LeaseUse use;
  NamedBlocks named;
  TimePoint deadline;
};

// A read of the peer.
class Serving : private Granted, public Source {
 public:
  Serving(Granted granted, uint64_t wire_id, bool wants_checksums);

  Code may_read() const override;
  int64_t bytes() const;
  void cancel() { is_cancelled_ = true; }
  // Nothing is read any more: whoever revokes need not wait longer.
  void release();

 protected:
  bool knows(int64_t block, uint64_t* checksum) const override;

 private:
  bool is_cancelled_ = false;
  Code why_released_ = Code::kStale;  // its last piece says so
  const bool wants_checksums_;
};

// A write of the peer that comes over the stream.
class Landing : private Granted, public Sink {
 public:
  Landing(Granted granted, std::vector<uint8_t> note);

  bool may_write() const override;
  void cancel() { is_cancelled_ = true; }
  void release() { use.release(); }
  bool is_settled() const { return checksums_.size() == Sink::blocks().size(); }
  // Of all blocks; those that did not come have the code of why.
  wire::Done outcome() const;
  std::vector<uint8_t> take_note() { return std::move(note_); }
  bool has_failed() const { return !failures_.empty(); }

 protected:
  void settle(int64_t block, uint64_t checksum, Code code) override;
  bool expects(int64_t block, uint64_t* checksum) const override;

 private:
  std::vector<uint8_t> note_;
  std::vector<uint64_t> checksums_;
  std::vector<wire::BlockFailure> failures_;
  bool is_cancelled_ = false;
};

}  // namespace kvx
