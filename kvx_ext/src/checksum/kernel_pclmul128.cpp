#include <immintrin.h>

#include "fold.h"
#include "kernels.h"

namespace kvx::crc64 {
namespace {

struct Pclmul128 {
  using Vector = __m128i;
  static constexpr size_t kBytes = 16;

  static Vector load(const uint8_t* source) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  }
  static void store(uint8_t* target, Vector value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), value);
  }
  static void store_streaming(uint8_t* target, Vector value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target), value);
  }
  static void fence() { _mm_sfence(); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm_xor_si128(a, b); }
  static Vector low_word(uint64_t word) { return _mm_cvtsi64_si128(static_cast<int64_t>(word)); }
  static Vector broadcast(FoldConstants constants) {
    return _mm_set_epi64x(static_cast<int64_t>(constants.high),
                          static_cast<int64_t>(constants.low));
  }
  static Vector fold(Vector accumulator, Vector constants, Vector data) {
    return exclusive_or(exclusive_or(_mm_clmulepi64_si128(accumulator, constants, 0x00),
                                     _mm_clmulepi64_si128(accumulator, constants, 0x11)),
                        data);
  }
};

}  // namespace

const ChecksumKernel kPclmul128Kernel = make_kernel<Pclmul128>("pclmul128");

}  // namespace kvx::crc64
