#include "kvx/engine.h"

#include "engine_core.h"

namespace kvx {

namespace {

constexpr int kCopyThreadsMax = 1024;
constexpr double kDestructorBoundS = 1.0;

}  // namespace

Status Engine::create(const EngineOptions& options, std::unique_ptr<Engine>* engine) {
  if (options.copy_threads < 0 || options.copy_threads > kCopyThreadsMax) {
    return {Code::kUsage, "copy_threads must be in 0..1024"};
  }
  std::unique_ptr<Engine> made(new Engine());
  auto core = std::make_shared<EngineCore>();
  Status status = core->start(options, &made->backend_reason_);
  if (!status.ok()) return status;
  made->core_ = std::move(core);
  *engine = std::move(made);
  return Status::Ok();
}

Engine::~Engine() {
  if (core_ != nullptr) (void)core_->close(kDestructorBoundS);
}

std::string_view Engine::backend_name() const { return core_->backend().name(); }

Status Engine::submit(Batch batch, double deadline_s, std::shared_ptr<Job>* job) {
  std::shared_ptr<JobRecord> record;
  Status status = core_->submit(std::move(batch), deadline_s, &record);
  if (status.ok()) *job = std::make_shared<Job>(std::move(record));
  return status;
}

Status Engine::attach_device(std::shared_ptr<Device> device, const CopyOptions& options) {
  if (device == nullptr) return {Code::kUsage, "there is no device to attach"};
  return core_->attach_device(std::move(device), options);
}

CopyStats Engine::copy_stats() const { return core_->copy_stats(); }

Status Engine::register_buffer(uint8_t* base, int64_t bytes) {
  if (base == nullptr || bytes <= 0) return {Code::kUsage, "a buffer needs an address and bytes"};
  return core_->backend().register_buffer(base, bytes);
}

void Engine::unregister_buffer(uint8_t* base) { core_->backend().unregister_buffer(base); }

std::vector<Completion> Engine::next_completions(size_t max, double timeout_s) {
  return core_->completions().take(max, timeout_s);
}

void Engine::wake() { core_->completions().push({}); }

int Engine::fileno() { return core_->completions().fileno(); }

EngineStats Engine::stats() const { return core_->stats(); }

CloseReport Engine::close(double timeout_s) { return core_->close(timeout_s); }

bool Engine::is_closed() const { return core_->is_closed(); }

}  // namespace kvx
