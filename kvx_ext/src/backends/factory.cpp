#include "backends/backends.h"
#include "kvx/backend_factory.h"
#include "kvx/journal.h"

namespace kvx {

namespace {

Status make_real(BackendKind kind, const BackendOptions& options, IoSink sink,
                 std::unique_ptr<IoBackend>* backend, std::string* why_not_uring) {
  if (kind != BackendKind::kPosix) {
    Status status = make_uring(options.queue_depth, sink, backend);
    const bool is_final = kind == BackendKind::kUring || status.code() == Code::kUsage;
    if (status.ok() || is_final) return status;
    *why_not_uring = status.message();
  }
  return make_posix(options.threads, std::move(sink), backend);
}

}  // namespace

Status make_backend(BackendKind kind, const BackendOptions& options, IoSink sink,
                    std::unique_ptr<IoBackend>* backend, std::string* why_not_uring) {
  std::string ignored;
  std::string* why = why_not_uring != nullptr ? why_not_uring : &ignored;
  why->clear();
  BackendFactory factory = [&, why](IoSink inner_sink, std::unique_ptr<IoBackend>* made) {
    return make_real(kind, options, std::move(inner_sink), made, why);
  };
  if (!options.journal_path.empty()) {
    factory = [inner = factory, &options](IoSink inner_sink, std::unique_ptr<IoBackend>* made) {
      return make_journaled(inner, options.journal_path, std::move(inner_sink), made);
    };
  }
  if (options.failpoints != nullptr) {
    return make_faulty(factory, options.failpoints, std::move(sink), backend);
  }
  return factory(std::move(sink), backend);
}

}  // namespace kvx
