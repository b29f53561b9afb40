// What the files that bind the agents share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>
#include <vector>

#include "arrays.h"
#include "bind.h"
#include "blocks.h"
#include "kvx/agent.h"
#include "kvx/checksum.h"

namespace kvx::bind {

using BlockKeys = nanobind::ndarray<const uint8_t, nanobind::shape<-1, kKeyBytes>,
                                    nanobind::c_contig, nanobind::device::cpu>;

template <typename T>
std::vector<T> copied(const std::optional<Row<T>>& row) {
  if (!row.has_value()) return {};
  return {row->data(), row->data() + row->shape(0)};
}

inline std::vector<uint8_t> copied(const std::optional<BlockKeys>& keys) {
  if (!keys.has_value()) return {};
  return {keys->data(), keys->data() + keys->shape(0) * kKeyBytes};
}

// The agent as Python owns it: closing late is a ResourceWarning, never a hang under the GIL.
struct PyAgent {
  std::unique_ptr<Agent> agent;

  PyAgent() = default;
  PyAgent(PyAgent&&) = default;
  PyAgent& operator=(PyAgent&&) = default;
  ~PyAgent() {
    if (agent == nullptr) return;
    if (!agent->is_closed() &&
        PyErr_WarnEx(PyExc_ResourceWarning, "kvx agent was not closed", 1) != 0) {
      PyErr_WriteUnraisable(nullptr);
    }
    nanobind::gil_scoped_release release;
    agent.reset();
  }
};

void bind_agent_memory(nanobind::class_<PyAgent>& agent);
void bind_agent_sharing(nanobind::module_& module, nanobind::class_<PyAgent>& agent);
void bind_agent_reports(nanobind::class_<PyAgent>& agent);
void bind_submission(nanobind::module_& module, nanobind::class_<PyAgent>& agent);

}  // namespace kvx::bind
