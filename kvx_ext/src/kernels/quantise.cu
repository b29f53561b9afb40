// FP8 (e4m3fn) with a scale for each block and head. kvx_amax, kvx_scale and kvx_quantise_fp8 run
// one after the other on a stream. The largest value does not depend on the order it is looked for
// in, so the result is the same for every grid, and that of kvx/transfer/relayout.py.
#include "kernels/floats.h"
#include "kernels/span.h"

namespace kvx::kernel {

// Items that a thread takes at a time: 8 bytes of FP8.
inline constexpr uint32_t kItems = 8;

template <typename T>
struct alignas(sizeof(T) * kItems < 16 ? sizeof(T) * kItems : 16) Items {
  T items[kItems];
};

// The smallest normal number. A subnormal scale would have lost bits, and is zero to a CPU that
// flushes them.
inline constexpr float kScaleMin = 1.17549435e-38f;

// Where the tokens of one block and head begin.
KVX_DEVICE uint64_t begin(uint64_t address, const int64_t* strides, uint64_t block, uint64_t head) {
  return address + block * strides[0] + head * strides[2];
}

KVX_DEVICE bool is_aligned(uint64_t address, const int64_t* strides, uint64_t bytes) {
  return ((address | strides[0] | strides[1] | strides[2]) & (bytes - 1)) == 0;
}

template <uint32_t Kind>
KVX_DEVICE float magnitude_of(typename Wide<Kind>::Item item) {
  const uint32_t magnitude = bits_of(Wide<Kind>::widened(item)) & ~kSign;
  return magnitude < kInfinity ? float_of(magnitude) : 0.0f;
}

// The largest finite magnitude of this thread's slice of a block and head.
template <uint32_t Kind>
KVX_DEVICE float amax_of_slice(const QuantiseParameters& p, uint64_t group, uint32_t slice) {
  using Item = typename Wide<Kind>::Item;
  const uint64_t block = divided(group, p.heads);
  const uint64_t base = begin(p.wide, p.wide_strides, block, group - block * p.heads);
  const bool is_wide = p.dim % kItems == 0 && is_aligned(p.wide, p.wide_strides, 16);
  const uint32_t taken = is_wide ? kItems : 1;
  const uint32_t sizes[2] = {p.tokens, p.dim / taken};
  const uint64_t cells = cells_of<2>(sizes);
  Odometer<2> position(sizes, slice, kAmaxSlices);
  float amax = 0.0f;
  KVX_ROLLED
  for (uint64_t i = slice; i < cells; i += kAmaxSlices, position.advance(sizes)) {
    const uint64_t at = base + position.digits[0] * p.wide_strides[1] +
                        uint64_t{position.digits[1]} * taken * sizeof(Item);
    if (is_wide) {
      const Items<Item> loaded = load<Items<Item>>(at);
      KVX_UNROLL
      for (uint32_t k = 0; k < kItems; ++k) {
        const float magnitude = magnitude_of<Kind>(loaded.items[k]);
        amax = magnitude > amax ? magnitude : amax;
      }
    } else {
      const float magnitude = magnitude_of<Kind>(load<Item>(at));
      amax = magnitude > amax ? magnitude : amax;
    }
  }
  return amax;
}

template <uint32_t Kind>
KVX_DEVICE void amax_by(const QuantiseParameters& p) {
  const uint64_t slices = uint64_t{p.blocks} * p.heads * kAmaxSlices;
  KVX_ROLLED
  for (uint64_t i = thread_index(); i < slices; i += thread_count()) {
    store(p.partials + i * 4,
          amax_of_slice<Kind>(p, i / kAmaxSlices, static_cast<uint32_t>(i % kAmaxSlices)));
  }
}

KVX_KERNEL void kvx_amax(KVX_PARAMETER QuantiseParameters p) {
  if (p.wide_kind == kFloat16) return amax_by<kFloat16>(p);
  if (p.wide_kind == kBfloat16) return amax_by<kBfloat16>(p);
  amax_by<kFloat32>(p);
}

KVX_KERNEL void kvx_scale(KVX_PARAMETER QuantiseParameters p) {
  const uint64_t groups = uint64_t{p.blocks} * p.heads;
  KVX_ROLLED
  for (uint64_t i = thread_index(); i < groups; i += thread_count()) {
    float amax = 0.0f;
    for (uint32_t slice = 0; slice < kAmaxSlices; ++slice) {
      const float partial = load<float>(p.partials + (i * kAmaxSlices + slice) * 4);
      amax = partial > amax ? partial : amax;
    }
    const float scale = amax / kFp8Max;
    store(p.scales + i * 4, amax == 0.0f ? 1.0f : (scale < kScaleMin ? kScaleMin : scale));
  }
}

// Not-a-number is passed by, for its sign: dividing may change it.
template <uint32_t Kind>
KVX_DEVICE uint8_t quantised(typename Wide<Kind>::Item item, float scale) {
  const float value = Wide<Kind>::widened(item);
  return fp8_of_float(is_nan(bits_of(value)) ? value : value / scale);
}

template <uint32_t Kind>
KVX_DEVICE typename Wide<Kind>::Item dequantised(uint8_t item, float scale) {
  const float value = float_of_fp8(item);
  const uint32_t sign = bits_of(value) & kSign;
  const uint32_t product = bits_of(value * scale);
  // Not-a-number keeps the sign of the item: that of the product differs between machines.
  if (is_nan(product)) return Wide<Kind>::narrowed(float_of(sign | 0x7FC00000));
  const bool is_beyond = (product & ~kSign) > Wide<Kind>::kMax;
  const uint32_t limit = (product & kSign) | Wide<Kind>::kMax;
  return Wide<Kind>::narrowed(float_of(is_beyond ? limit : product));
}

// Calls `convert(wide address, narrow address, scale)` for every `taken` items of this thread.
template <typename Item, typename Convert>
KVX_DEVICE void for_items(const QuantiseParameters& p, uint32_t taken, Convert convert) {
  const uint32_t sizes[4] = {p.blocks, p.tokens, p.heads, p.dim / taken};
  const uint64_t cells = cells_of<4>(sizes);
  uint64_t cell = thread_index();
  if (cell >= cells) return;
  const uint64_t step = thread_count();
  Odometer<4> at(sizes, cell, step);
  KVX_ROLLED
  for (; cell < cells; cell += step, at.advance(sizes)) {
    const uint64_t token = at.digits[1];
    const uint64_t item = uint64_t{at.digits[3]} * taken;
    const uint64_t wide = begin(p.wide, p.wide_strides, at.digits[0], at.digits[2]);
    const uint64_t narrow = begin(p.narrow, p.narrow_strides, at.digits[0], at.digits[2]);
    convert(wide + token * p.wide_strides[1] + item * sizeof(Item),
            narrow + token * p.narrow_strides[1] + item,
            load<float>(p.scales + (uint64_t{at.digits[0]} * p.heads + at.digits[2]) * 4));
  }
}

KVX_DEVICE bool takes_items(const QuantiseParameters& p) {
  return p.dim % kItems == 0 && is_aligned(p.wide, p.wide_strides, 16) &&
         is_aligned(p.narrow, p.narrow_strides, kItems);
}

template <uint32_t Kind>
KVX_DEVICE void quantise_by(const QuantiseParameters& p) {
  using Item = typename Wide<Kind>::Item;
  if (!takes_items(p)) {
    return for_items<Item>(p, 1, [](uint64_t wide, uint64_t narrow, float scale) {
      store(narrow, quantised<Kind>(load<Item>(wide), scale));
    });
  }
  for_items<Item>(p, kItems, [](uint64_t wide, uint64_t narrow, float scale) {
    const Items<Item> loaded = load<Items<Item>>(wide);
    Items<uint8_t> made;
    KVX_UNROLL
    for (uint32_t k = 0; k < kItems; ++k) made.items[k] = quantised<Kind>(loaded.items[k], scale);
    store(narrow, made);
  });
}

KVX_KERNEL void kvx_quantise_fp8(KVX_PARAMETER QuantiseParameters p) {
  if (p.wide_kind == kFloat16) return quantise_by<kFloat16>(p);
  if (p.wide_kind == kBfloat16) return quantise_by<kBfloat16>(p);
  quantise_by<kFloat32>(p);
}

template <uint32_t Kind>
KVX_DEVICE void dequantise_by(const QuantiseParameters& p) {
  using Item = typename Wide<Kind>::Item;
  if (!takes_items(p)) {
    return for_items<Item>(p, 1, [](uint64_t wide, uint64_t narrow, float scale) {
      store(wide, dequantised<Kind>(load<uint8_t>(narrow), scale));
    });
  }
  for_items<Item>(p, kItems, [](uint64_t wide, uint64_t narrow, float scale) {
    const Items<uint8_t> loaded = load<Items<uint8_t>>(narrow);
    Items<Item> made;
    KVX_UNROLL
    for (uint32_t k = 0; k < kItems; ++k) made.items[k] = dequantised<Kind>(loaded.items[k], scale);
    store(wide, made);
  });
}

KVX_KERNEL void kvx_dequantise_fp8(KVX_PARAMETER QuantiseParameters p) {
  if (p.wide_kind == kFloat16) return dequantise_by<kFloat16>(p);
  if (p.wide_kind == kBfloat16) return dequantise_by<kBfloat16>(p);
  dequantise_by<kFloat32>(p);
}

}  // namespace kvx::kernel
