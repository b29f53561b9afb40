#include "kvx/journal.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace kvx {

namespace {

constexpr std::string_view kMagic = "KVXJRNL1";

enum class RecordType : uint8_t { kSubmitted = 1, kCompleted = 2, kEnd = 3 };

struct Record {
  RecordType type = RecordType::kEnd;
  uint8_t kind = 0;
  uint16_t zero = 0;
  int32_t code = 0;
  uint64_t sequence = 0;
  uint64_t device = 0;
  uint64_t inode = 0;
  int64_t offset = 0;
  int64_t bytes = 0;
};
static_assert(sizeof(Record) == 48);

class JournaledBackend final : public IoBackend {
 public:
  JournaledBackend(int fd, IoSink sink) : fd_(fd), sink_(std::move(sink)) {}
  ~JournaledBackend() override {
    inner_.reset();
    ::close(fd_);
  }

  Status start(const BackendFactory& factory) {
    append_bytes(reinterpret_cast<const uint8_t*>(kMagic.data()), kMagic.size());
    return factory([this](std::span<const IoCompletion> done) { on_completions(done); }, &inner_);
  }

  std::string_view name() const override { return inner_->name(); }
  Status register_buffer(uint8_t* base, int64_t bytes) override {
    return inner_->register_buffer(base, bytes);
  }
  void unregister_buffer(uint8_t* base) override { inner_->unregister_buffer(base); }

  void submit(std::span<const IoRequest> requests) override {
    {
      std::lock_guard lock(mutex_);
      for (const IoRequest& request : requests) {
        if (request.kind != IoKind::kRead) note_submitted(request);
      }
    }
    inner_->submit(requests);
  }

  void cancel(uint64_t token) override { inner_->cancel(token); }

  int64_t close(double timeout_s) override {
    const int64_t abandoned = inner_->close(timeout_s);
    std::lock_guard lock(mutex_);
    if (!is_closed_) append({}, nullptr);
    is_closed_ = true;
    return abandoned;
  }

 private:
  struct Pending {
    uint64_t sequence;
    uint8_t kind;
  };

  void note_submitted(const IoRequest& request) {
    struct stat file = {};
    (void)fstat(request.fd, &file);  // a bad descriptor: the request fails, its record says file 0
    const bool is_write = request.kind == IoKind::kWrite;
    Record record;
    record.type = RecordType::kSubmitted;
    record.kind = static_cast<uint8_t>(request.kind);
    record.sequence = next_sequence_++;
    record.device = file.st_dev;
    record.inode = file.st_ino;
    record.offset = is_write ? request.offset : 0;
    record.bytes = is_write && request.bytes > 0 ? request.bytes : 0;
    pending_[request.token] = {record.sequence, record.kind};
    append(record, request.buffer);
  }

  void on_completions(std::span<const IoCompletion> completions) {
    {
      std::lock_guard lock(mutex_);
      for (const IoCompletion& completion : completions) {
        const auto found = pending_.find(completion.token);
        if (found == pending_.end()) continue;
        Record record;
        record.type = RecordType::kCompleted;
        record.kind = found->second.kind;
        record.code = static_cast<int32_t>(completion.code);
        record.sequence = found->second.sequence;
        append(record, nullptr);
        pending_.erase(found);
      }
    }
    sink_(completions);
  }

  void append(const Record& record, const uint8_t* data) {
    append_bytes(reinterpret_cast<const uint8_t*>(&record), sizeof record);
    append_bytes(data, static_cast<size_t>(record.bytes));
  }

  // After a failure nothing is appended any more: the reader sees a journal without its end.
  void append_bytes(const uint8_t* data, size_t bytes) {
    while (bytes > 0 && !is_broken_) {
      const ssize_t written = write(fd_, data, bytes);
      if (written < 0 && errno == EINTR) continue;
      is_broken_ = written <= 0;
      if (is_broken_) return;
      data += written;
      bytes -= static_cast<size_t>(written);
    }
  }

  const int fd_;
  const IoSink sink_;
  std::unique_ptr<IoBackend> inner_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Pending> pending_;  // mutex_, by token
  uint64_t next_sequence_ = 0;                     // mutex_
  bool is_broken_ = false;                         // mutex_
  bool is_closed_ = false;                         // mutex_
};

}  // namespace

Status make_journaled(const BackendFactory& inner, const std::string& path, IoSink sink,
                      std::unique_ptr<IoBackend>* backend) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) {
    const int error = errno;
    return {Code::kStorage, "cannot create the journal " + path + ": " + std::strerror(error),
            error};
  }
  auto made = std::make_unique<JournaledBackend>(fd, std::move(sink));
  if (Status status = made->start(inner); !status.ok()) return status;
  *backend = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
