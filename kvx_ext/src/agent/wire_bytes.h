// Puts numbers into a frame and takes them out again; takes nothing that is not there.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

namespace kvx::wire {

static_assert(std::endian::native == std::endian::little, "frames are written as memory has them");

// Whose bytes are all of their value: no padding that would carry what memory held before.
template <typename T>
inline constexpr bool kIsWhole =
    std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T>;

class ByteWriter {
 public:
  // REQUIRES: `target` has room for everything that is put.
  explicit ByteWriter(std::span<uint8_t> target) : target_(target) {}

  template <typename T>
  void put(T value) {
    put_all(std::span<const T>(&value, 1));
  }
  template <typename T>
  void put_all(std::span<const T> values) {
    static_assert(kIsWhole<T>);
    if (values.empty()) return;
    std::memcpy(target_.data(), values.data(), values.size_bytes());
    target_ = target_.subspan(values.size_bytes());
  }
  bool is_full() const { return target_.empty(); }

 private:
  std::span<uint8_t> target_;
};

class ByteReader {
 public:
  explicit ByteReader(std::span<const uint8_t> source) : source_(source) {}

  // False, and nothing is taken, where too little is left.
  template <typename T>
  [[nodiscard]] bool take(T* value) {
    static_assert(kIsWhole<T> && !std::is_same_v<T, bool>);
    if (source_.size() < sizeof(T)) return false;
    std::memcpy(value, source_.data(), sizeof(T));
    source_ = source_.subspan(sizeof(T));
    return true;
  }
  // Looks whether `count` of them are there before it makes room for them.
  template <typename T>
  [[nodiscard]] bool take_all(size_t count, std::vector<T>* values) {
    static_assert(kIsWhole<T>);
    if (source_.size() / sizeof(T) < count) return false;
    values->resize(count);
    if (count > 0) std::memcpy(values->data(), source_.data(), count * sizeof(T));
    source_ = source_.subspan(count * sizeof(T));
    return true;
  }
  size_t left() const { return source_.size(); }

 private:
  std::span<const uint8_t> source_;
};

}  // namespace kvx::wire
