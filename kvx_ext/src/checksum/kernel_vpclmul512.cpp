#include <immintrin.h>

#include "fold.h"
#include "kernels.h"

namespace kvx::crc64 {
namespace {

struct Vpclmul512 {
  using Vector = __m512i;
  static constexpr size_t kBytes = 64;

  static Vector load(const uint8_t* source) { return _mm512_loadu_si512(source); }
  static void store(uint8_t* target, Vector value) { _mm512_storeu_si512(target, value); }
  static void store_streaming(uint8_t* target, Vector value) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), value);
  }
  static void fence() { _mm_sfence(); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
  static Vector low_word(uint64_t word) {
    return _mm512_zextsi128_si512(_mm_cvtsi64_si128(static_cast<int64_t>(word)));
  }
  static Vector broadcast(FoldConstants constants) {
    return _mm512_broadcast_i32x4(
        _mm_set_epi64x(static_cast<int64_t>(constants.high), static_cast<int64_t>(constants.low)));
  }
  static Vector fold(Vector accumulator, Vector constants, Vector data) {
    constexpr int kXorOfThree = 0x96;
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(accumulator, constants, 0x00),
                                     _mm512_clmulepi64_epi128(accumulator, constants, 0x11), data,
                                     kXorOfThree);
  }
};

}  // namespace

const ChecksumKernel kVpclmul512Kernel = make_kernel<Vpclmul512>("vpclmul512");

}  // namespace kvx::crc64
