#include "device/cuda_lane.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "device/cuda_mark.h"
#include "shim/sabotage.h"

namespace kvx {

namespace {

// Small copies end before a thread could be woken; longer ones are not worth a CPU.
constexpr auto kPollTime = std::chrono::microseconds(20);
constexpr auto kRetryPause = std::chrono::milliseconds(1);

void add(const CopyStats& part, CopyStats* total) {
  for (size_t i = 0; i < kCopyDirections; ++i) {
    total->bytes[i] += part.bytes[i];
    total->requests[i] += part.requests[i];
  }
  for (size_t i = 0; i < kCopyMethods; ++i) {
    total->runs_by_method[i] += part.runs_by_method[i];
    total->calls_by_method[i] += part.calls_by_method[i];
  }
  total->kernels_launched += part.kernels_launched;
  total->pageable_bytes += part.pageable_bytes;
  total->submit_ns += part.submit_ns;
  total->prepare_ns += part.prepare_ns;
}

}  // namespace

Status CudaLane::create(std::shared_ptr<CudaDevice> device, CopyDirection direction,
                        std::shared_ptr<CopyDesk> desk, const CopyOptions& options,
                        std::shared_ptr<CudaLane>* lane) {
  cuda::Stream stream = nullptr;
  Status status = device->context().call("cuStreamCreateWithPriority", [&] {
    if (makes(Mistake::kUsesNullStream)) return cuda::kSuccess;
    int least = 0;
    int greatest = 0;
    const cuda::Result result = device->api().context_stream_priorities(&least, &greatest);
    if (result != cuda::kSuccess) return result;
    return device->api().stream_create(&stream, cuda::kStreamNonBlocking, greatest);
  });
  if (!status.ok()) return status;
  lane->reset(new CudaLane(device, direction, std::move(desk), options, stream));
  return CudaStaging::create(device, direction, options, stream, &(*lane)->staging_);
}

CudaLane::CudaLane(std::shared_ptr<CudaDevice> device, CopyDirection direction,
                   std::shared_ptr<CopyDesk> desk, const CopyOptions& options, cuda::Stream stream)
    : device_(std::move(device)),
      context_(device_->context()),
      direction_(direction),
      desk_(std::move(desk)),
      options_(options),
      stream_(stream),
      issuer_(context_, direction, stream) {}

CudaLane::~CudaLane() {
  staging_.reset();
  context_.release("cuStreamDestroy", [this] { return context_.api().stream_destroy(stream_); });
}

void CudaLane::Group::fail(Code code, cuda::Result result) {
  failed = result;
  for (CopyCompletion& completion : completions) {
    completion.code = code;
    completion.driver_error = result;
  }
}

void CudaLane::run_submitting() {
  std::vector<CopyRequest> requests;
  while (true) {
    wait_for_room();
    if (!desk_->take(direction_, &requests)) break;
    Group group;
    submit_group(&requests, &group);
    requests.clear();
    std::lock_guard lock(mutex_);
    groups_.push_back(std::move(group));
    news_.notify_one();
  }
  std::lock_guard lock(mutex_);
  is_at_end_ = true;
  news_.notify_one();
}

void CudaLane::wait_for_room() {
  std::unique_lock lock(mutex_);
  room_.wait(lock, [this] { return groups_.size() < kGroupsInDriverMax; });
}

void CudaLane::submit_group(std::vector<CopyRequest>* requests, Group* group) {
  const TimePoint begin = Clock::now();
  fresh_ = {};
  for (const CopyRequest& request : *requests) {
    group->completions.push_back({request.token, Code::kOk, 0});
  }
  const std::shared_ptr<StreamMark>& after = requests->front().after;
  if (after != nullptr && dynamic_cast<const CudaMark*>(after.get()) == nullptr) {
    group->fail(Code::kUsage, cuda::kSuccess);
  } else if (const cuda::Result result = hand_over(*requests, group); result != cuda::kSuccess) {
    group->fail(Code::kDevice, result);
  }
  fresh_.submit_ns = ns_between(begin, Clock::now());
  fresh_.requests[static_cast<size_t>(direction_)] = static_cast<int64_t>(requests->size());
  std::lock_guard lock(mutex_);
  add(fresh_, &stats_);
}

cuda::Result CudaLane::hand_over(const std::vector<CopyRequest>& requests, Group* group) {
  if (context_.is_dead()) return context_.fatal();
  const ContextScope scope(context_);
  if (scope.result() != cuda::kSuccess) return context_.note(scope.result());
  cuda::Result result = device_->events().take(&group->event);
  if (result != cuda::kSuccess) return result;
  const auto* mark = static_cast<const CudaMark*>(requests.front().after.get());
  if (mark != nullptr && !makes(Mistake::kSkipsEventWait)) {
    result = context_.note(context_.api().stream_wait_event(stream_, mark->event(), 0));
    if (result != cuda::kSuccess) return result;
  }
  const TimePoint begin = Clock::now();
  sort_runs(requests);
  fresh_.prepare_ns += ns_between(begin, Clock::now());
  group->may_move = true;
  has_staged_ = false;
  result = hand_over_runs(pinned_runs_, true, mark != nullptr);
  if (result == cuda::kSuccess) result = hand_over_runs(pageable_runs_, false, mark != nullptr);
  if (result != cuda::kSuccess) return result;
  if (has_staged_) return staging_->end(group->event.get());
  return context_.note(context_.api().event_record(group->event.get(), stream_));
}

// By whether the host side is registered: only then may the driver take it in batches. Registers
// pieces that the pinning thread has not come to.
void CudaLane::sort_runs(const std::vector<CopyRequest>& requests) {
  pinned_ = device_->pinned().view();
  pinned_runs_.clear();
  pageable_runs_.clear();
  // Most runs lie in the piece that the last one lay in, which need not be looked up again.
  uint64_t known_begin = 0;
  uint64_t known_end = 0;
  for (const CopyRequest& request : requests) {
    const CopyRuns& runs = request.runs;
    const std::vector<uint64_t>& hosts =
        direction_ == CopyDirection::kHostToDevice ? runs.sources : runs.targets;
    for (size_t i = 0; i < runs.size(); ++i) {
      if (runs.bytes[i] == 0) continue;
      const uint64_t end = hosts[i] + runs.bytes[i];
      bool is_pinned = direction_ == CopyDirection::kDeviceToDevice ||
                       (hosts[i] >= known_begin && end <= known_end);
      if (!is_pinned && pinned_->ensure(hosts[i], runs.bytes[i])) {
        is_pinned = true;
        const uint64_t piece_end = pinned_->piece_end(end - 1);
        known_begin = piece_end == known_end ? std::min(known_begin, hosts[i]) : hosts[i];
        known_end = piece_end;
      }
      (is_pinned ? pinned_runs_ : pageable_runs_)
          .add(runs.targets[i], runs.sources[i], runs.bytes[i]);
      if (!is_pinned) fresh_.pageable_bytes += static_cast<int64_t>(runs.bytes[i]);
      fresh_.bytes[static_cast<size_t>(direction_)] += static_cast<int64_t>(runs.bytes[i]);
    }
  }
}

cuda::Result CudaLane::hand_over_runs(const CopyRuns& runs, bool is_pinned, bool has_mark) {
  if (runs.size() == 0) return cuda::kSuccess;
  CopyLimits limits;
  limits.has_batch = is_pinned && issuer_.has_batch();
  limits.has_kernels = is_pinned && staging_ != nullptr;
  limits.staging_bytes = limits.has_kernels ? staging_->bytes() : 0;
  limits.pinned = pinned_->spans;
  const TimePoint begin = Clock::now();
  plan_copies(direction_, runs, options_.calibration, limits, &plan_);
  fresh_.prepare_ns += ns_between(begin, Clock::now());
  // Any order lets the driver read the source before what precedes it in the stream: allowed only
  // where the bytes are final, which a mark denies.
  const bool is_final = direction_ == CopyDirection::kHostToDevice && is_pinned && !has_mark;
  const bool is_any = is_final || (has_mark && makes(Mistake::kAnyOrderAfterWait));
  const int source_order = is_any ? cuda::kSourceOrderAny : cuda::kSourceOrderStream;
  for (const CopyCall& call : plan_.calls) {
    const cuda::Result result = call.method == CopyMethod::kStaged
                                    ? issue_staged(call)
                                    : issuer_.issue(call, source_order, &plan_.runs, &fresh_);
    if (result != cuda::kSuccess) return result;
  }
  return cuda::kSuccess;
}

cuda::Result CudaLane::issue_staged(const CopyCall& call) {
  if (!has_staged_) {
    const cuda::Result result = staging_->begin();
    if (result != cuda::kSuccess) return result;
    has_staged_ = true;
  }
  return staging_->copy(call, plan_.runs, &fresh_);
}

bool CudaLane::next_group(Group** group) {
  std::unique_lock lock(mutex_);
  news_.wait(lock, [this] { return !groups_.empty() || is_at_end_; });
  if (groups_.empty()) return false;
  *group = &groups_.front();  // a deque does not move what it holds
  return true;
}

void CudaLane::run_completing() {
  Group* group = nullptr;
  while (next_group(&group)) {
    wait_for(group);
    const std::vector<CopyCompletion> completions = std::move(group->completions);
    {
      std::lock_guard lock(mutex_);
      groups_.pop_front();
      room_.notify_one();
    }
    desk_->deliver(completions);
  }
}

void CudaLane::wait_for(Group* group) {
  if (makes(Mistake::kCompletesEarly)) return;
  if (group->failed == cuda::kSuccess && group->may_move) {
    const cuda::Result result = wait_for_event(group->event.get());
    if (result != cuda::kSuccess) group->fail(Code::kDevice, result);
  }
  if (group->failed != cuda::kSuccess && group->may_move) quiesce();
}

cuda::Result CudaLane::wait_for_event(cuda::Event event) {
  const ContextScope scope(context_);  // an event can be asked without it, too
  const TimePoint give_up = Clock::now() + kPollTime;
  do {
    const cuda::Result result = context_.api().event_query(event);
    if (result != cuda::kErrorNotReady) return context_.note(result);
  } while (Clock::now() < give_up);
  return context_.note(context_.api().event_synchronize(event));
}

// Returns when the streams are known to be idle, or the context is dead.
void CudaLane::quiesce() {
  while (!context_.is_dead() && !is_abandoned_.load()) {
    {
      const ContextScope scope(context_);
      cuda::Result result = context_.api().stream_synchronize(stream_);
      if (result == cuda::kSuccess && staging_ != nullptr) {
        result = context_.api().stream_synchronize(staging_->kernel_stream());
      }
      if (context_.note(result) == cuda::kSuccess) return;
    }
    std::this_thread::sleep_for(kRetryPause);
  }
}

void CudaLane::add_stats(CopyStats* total) const {
  std::lock_guard lock(mutex_);
  add(stats_, total);
}

}  // namespace kvx
