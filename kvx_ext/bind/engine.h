// What the three files that bind the engine share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <string_view>
#include <vector>

#include "bind.h"
#include "kvx/engine.h"

namespace kvx::bind {

// The engine as Python owns it: closing late is a ResourceWarning, never a hang under the GIL.
struct PyEngine {
  std::unique_ptr<Engine> engine;

  PyEngine() = default;
  PyEngine(PyEngine&&) = default;
  PyEngine& operator=(PyEngine&&) = default;
  ~PyEngine() {
    if (engine == nullptr) return;
    if (!engine->is_closed() &&
        PyErr_WarnEx(PyExc_ResourceWarning, "kvx engine was not closed", 1) != 0) {
      PyErr_WriteUnraisable(nullptr);
    }
    nanobind::gil_scoped_release release;
    engine.reset();
  }
};

template <typename T>
using Array = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>>;

template <typename T>
Array<T> owned(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  nanobind::capsule owner(kept,
                          [](void* data) noexcept { delete static_cast<std::vector<T>*>(data); });
  return {kept->data(), {kept->size()}, owner};
}

template <typename Call>
auto without_gil(Call call) {
  nanobind::gil_scoped_release release;
  return call();
}

inline nanobind::str name_of(std::string_view name) {
  return nanobind::str(name.data(), name.size());
}

void bind_job(nanobind::module_& module);
void bind_submission(nanobind::class_<PyEngine>& engine);
void bind_device_submission(nanobind::class_<PyEngine>& engine);

}  // namespace kvx::bind
