#include "kvx/failpoint.h"

#include <algorithm>
#include <string>

namespace kvx {

namespace {

constexpr std::array<std::string_view, 5> kTargets = {"read", "write", "sync", "any", "copy"};
constexpr std::array<std::string_view, kFaultActions> kActions = {
    "eio", "enospc", "short", "delay", "hang", "torn", "flip", "drop"};

template <typename Enum, size_t kCount>
Status parse(std::string_view name, const std::array<std::string_view, kCount>& names,
             std::string_view what, Enum* value) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) {
    *value = static_cast<Enum>(found - names.begin());
    return Status::Ok();
  }
  std::string message(what);
  message.append(" \"").append(name).append("\" is none of");
  for (const std::string_view accepted : names) message.append(" ").append(accepted);
  return {Code::kUsage, message};
}

bool can_show(FaultAction action, FaultTarget target) {
  if (target == FaultTarget::kCopy) {
    return action == FaultAction::kDelay || action == FaultAction::kHang ||
           action == FaultAction::kFlip;
  }
  switch (action) {
    case FaultAction::kTorn:
      return target == FaultTarget::kWrite;
    case FaultAction::kShort:
    case FaultAction::kFlip:
      return target != FaultTarget::kSync;
    default:
      return true;
  }
}

bool matches(const FaultRule& rule, FaultTarget target) {
  const bool is_any = rule.target == FaultTarget::kAny && target != FaultTarget::kCopy;
  return (is_any || rule.target == target) && can_show(rule.action, target);
}

}  // namespace

Status Failpoints::set(const FaultRule& rule) {
  if (rule.after < 0 || rule.count < -1) return {Code::kUsage, "after >= 0 and count >= -1 needed"};
  if (!(rule.probability >= 0.0 && rule.probability <= 1.0)) {
    return {Code::kUsage, "probability must be in 0..1"};
  }
  if (!(rule.delay_s >= 0.0 && rule.delay_s <= 3600.0)) {
    return {Code::kUsage, "delay_s must be in 0..3600"};
  }
  if (rule.target != FaultTarget::kAny && !can_show(rule.action, rule.target)) {
    std::string message(fault_action_name(rule.action));
    message += " cannot spoil a ";
    message += kTargets[static_cast<size_t>(rule.target)];
    return {Code::kUsage, message};
  }
  std::lock_guard lock(mutex_);
  std::erase_if(rules_, [&](const Armed& armed) {
    return armed.rule.target == rule.target && armed.rule.action == rule.action;
  });
  rules_.push_back({rule, std::mt19937_64(rule.seed), 0, 0});
  return Status::Ok();
}

void Failpoints::clear() {
  std::vector<std::shared_ptr<FaultListener>> listeners;
  {
    std::lock_guard lock(mutex_);
    rules_.clear();
    std::erase_if(listeners_, [](const auto& listener) { return listener.expired(); });
    for (const auto& listener : listeners_) {
      if (auto held = listener.lock()) listeners.push_back(std::move(held));
    }
  }
  for (const auto& listener : listeners) listener->release();
}

std::optional<Fault> Failpoints::next(IoKind kind) {
  static_assert(static_cast<int>(FaultTarget::kSync) == static_cast<int>(IoKind::kSync));
  return next(static_cast<FaultTarget>(static_cast<int>(kind)));
}

std::optional<Fault> Failpoints::next_copy() { return next(FaultTarget::kCopy); }

std::optional<Fault> Failpoints::next(FaultTarget target) {
  std::lock_guard lock(mutex_);
  for (Armed& armed : rules_) {
    if (!matches(armed.rule, target) || ++armed.seen <= armed.rule.after) continue;
    if (armed.rule.count >= 0 && armed.spoiled >= armed.rule.count) continue;
    const double draw = std::generate_canonical<double, 53>(armed.random);
    if (draw >= armed.rule.probability) continue;
    ++armed.spoiled;
    ++hits_[static_cast<size_t>(armed.rule.action)];
    return Fault{armed.rule, armed.random()};
  }
  return std::nullopt;
}

std::array<int64_t, kFaultActions> Failpoints::hits() const {
  std::lock_guard lock(mutex_);
  return hits_;
}

void Failpoints::listen(std::weak_ptr<FaultListener> listener) {
  std::lock_guard lock(mutex_);
  listeners_.push_back(std::move(listener));
}

Status parse_fault_target(std::string_view name, FaultTarget* target) {
  return parse(name, kTargets, "operation", target);
}

Status parse_fault_action(std::string_view name, FaultAction* action) {
  return parse(name, kActions, "action", action);
}

std::string_view fault_action_name(FaultAction action) {
  return kActions[static_cast<size_t>(action)];
}

}  // namespace kvx
