// The float formats of a KV cache as bits, so that every compiler and every machine agrees on each
// of them. All roundings are to nearest, ties to even.
#pragma once

#include "kernels/parameters.h"

namespace kvx::kernel {

inline constexpr uint32_t kSign = 0x80000000u;
inline constexpr uint32_t kInfinity = 0x7F800000u;  // above it, without the sign, lies not-a-number
inline constexpr float kFp8Max = 448.0f;

KVX_DEVICE bool is_nan(uint32_t bits) { return (bits & ~kSign) > kInfinity; }

// Drops the lowest `drop` bits. A carry into the exponent is the right result.
KVX_DEVICE uint32_t rounded(uint32_t magnitude, uint32_t drop) {
  const uint32_t half = (1u << (drop - 1)) - 1;
  return (magnitude + half + ((magnitude >> drop) & 1)) >> drop;
}

KVX_DEVICE float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00) return float_of(sign | kInfinity | (magnitude & 0x3FF) << 13);
  if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: a whole number of 2^-24, which the product holds exactly.
  const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  return float_of(sign | bits_of(value));
}

KVX_DEVICE uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits & kSign) >> 16;
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7C00);  // 65536 and above
  if (magnitude >= 0x38800000) {
    return static_cast<uint16_t>(sign | rounded(magnitude - (112u << 23), 13));
  }
  // Beside 0.5 the last bit is worth 2^-24, so the sum does the rounding.
  const uint32_t sum = bits_of(float_of(magnitude) + 0.5f);
  return static_cast<uint16_t>(sign | (sum - 0x3F000000));
}

KVX_DEVICE float float_of_bfloat(uint16_t bfloat) { return float_of(uint32_t{bfloat} << 16); }

KVX_DEVICE uint16_t bfloat_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits & kSign) >> 16;
  if (is_nan(bits)) return static_cast<uint16_t>(sign | 0x7FC0);
  return static_cast<uint16_t>(sign | rounded(bits & ~kSign, 16));
}

// e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity. What is beyond 448 becomes 448.
KVX_DEVICE uint8_t fp8_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits & kSign) >> 24;
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return static_cast<uint8_t>(sign | 0x7F);
  if (magnitude >= 0x43E00000) return static_cast<uint8_t>(sign | 0x7E);
  if (magnitude >= 0x3C800000) {
    return static_cast<uint8_t>(sign | rounded(magnitude - (120u << 23), 20));
  }
  // Below 2^-6, subnormal. Beside 2^14 the last bit is worth 2^-9.
  const uint32_t sum = bits_of(float_of(magnitude) + 16384.0f);
  return static_cast<uint8_t>(sign | (sum - 0x46800000));
}

KVX_DEVICE float float_of_fp8(uint8_t fp8) {
  const uint32_t sign = uint32_t{fp8 & 0x80u} << 24;
  const uint32_t magnitude = fp8 & 0x7Fu;
  if (magnitude == 0x7F) return float_of(sign | 0x7FC00000);
  if (magnitude >= 0x08) return float_of(sign | ((magnitude << 20) + (120u << 23)));
  const float value = static_cast<float>(magnitude) * 0.001953125f;
  return float_of(sign | bits_of(value));
}

// `Kind` picks the wide format at compile time: its item, and the ways from and to float32.
template <uint32_t Kind>
struct Wide;

template <>
struct Wide<kFloat16> {
  using Item = uint16_t;
  static constexpr uint32_t kMax = 0x477FE000;  // the largest finite value, as float32
  KVX_DEVICE static float widened(Item item) { return float_of_half(item); }
  KVX_DEVICE static Item narrowed(float value) { return half_of_float(value); }
};

template <>
struct Wide<kBfloat16> {
  using Item = uint16_t;
  static constexpr uint32_t kMax = 0x7F7F0000;
  KVX_DEVICE static float widened(Item item) { return float_of_bfloat(item); }
  KVX_DEVICE static Item narrowed(float value) { return bfloat_of_float(value); }
};

template <>
struct Wide<kFloat32> {
  using Item = uint32_t;
  static constexpr uint32_t kMax = 0x7F7FFFFF;
  KVX_DEVICE static float widened(Item item) { return float_of(item); }
  // One not-a-number for each sign: what arithmetic makes of the rest differs between machines.
  KVX_DEVICE static Item narrowed(float value) {
    const uint32_t bits = bits_of(value);
    return is_nan(bits) ? (bits & kSign) | 0x7FC00000 : bits;
  }
};

}  // namespace kvx::kernel
