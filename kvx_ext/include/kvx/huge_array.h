// A zero-filled array on pages of its own, huge ones asked for: random access to tens of megabytes
// is bound by TLB misses on 4 KiB pages. Growing moves it; elements are plain data.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "kvx/status.h"

namespace kvx {

template <typename T>
class HugeArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  HugeArray() = default;
  ~HugeArray() { release(); }
  HugeArray(const HugeArray&) = delete;
  HugeArray& operator=(const HugeArray&) = delete;

  // Makes it `size` elements, keeping what there was; kCapacity, and nothing done, without memory.
  Status resize(size_t size) {
    const size_t bytes = size * sizeof(T);
    void* mapped = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
      return {Code::kCapacity, "no memory for " + std::to_string(bytes) + " bytes of index"};
    }
    if (bytes >= kHugeBytes) madvise(mapped, bytes, MADV_HUGEPAGE);
    if (data_ != nullptr) std::memcpy(mapped, data_, std::min(size, size_) * sizeof(T));
    release();
    data_ = static_cast<T*>(mapped);
    size_ = size;
    return Status::Ok();
  }

  void swap(HugeArray& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  [[nodiscard]] size_t size() const { return size_; }
  [[nodiscard]] int64_t memory_bytes() const { return static_cast<int64_t>(size_ * sizeof(T)); }
  [[nodiscard]] T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  static constexpr size_t kHugeBytes = 2 << 20;

  void release() {
    if (data_ != nullptr) munmap(data_, std::max<size_t>(size_ * sizeof(T), 1));
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kvx
