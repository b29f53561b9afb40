// Arrays at the boundary: what batches take, and numpy arrays made from native results.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "bind.h"

namespace kvx::bind {

template <typename T>
using Row =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <typename T>
using NumpyRow = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>>;

template <typename T>
std::span<const T> view(const Row<T>& row) {
  return {row.data(), row.shape(0)};
}

// A result array: written by native code without the GIL, then given to Python as it is.
template <typename T>
class NewRow {
 public:
  explicit NewRow(size_t size) : data_(new T[size == 0 ? 1 : size]), size_(size) {}

  std::span<T> span() { return {data_.get(), size_}; }

  // The first `size` elements as a numpy array that owns them, as `As` (of T's size).
  template <typename As = T>
  NumpyRow<As> numpy(size_t size) {
    T* data = data_.release();
    nanobind::capsule owner(data, [](void* at) noexcept { delete[] static_cast<T*>(at); });
    return {data, {size}, owner};
  }
  template <typename As = T>
  NumpyRow<As> numpy() {
    return numpy<As>(size_);
  }

 private:
  std::unique_ptr<T[]> data_;
  size_t size_;
};

// `values` as a numpy array of `shape` without a copy.
template <typename As, size_t kDimensions, typename T>
nanobind::ndarray<nanobind::numpy, As, nanobind::ndim<kDimensions>> adopt(
    std::vector<T> values, std::initializer_list<size_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  nanobind::capsule owner(kept, [](void* at) noexcept { delete static_cast<std::vector<T>*>(at); });
  return {kept->data(), shape, owner};
}

template <typename T>
NumpyRow<T> adopt_row(std::vector<T> values) {
  const size_t size = values.size();
  return adopt<T, 1>(std::move(values), {size});
}

}  // namespace kvx::bind
