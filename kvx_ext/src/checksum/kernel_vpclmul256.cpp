#include <immintrin.h>

#include "fold.h"
#include "kernels.h"

namespace kvx::crc64 {
namespace {

struct Vpclmul256 {
  using Vector = __m256i;
  static constexpr size_t kBytes = 32;

  static Vector load(const uint8_t* source) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  }
  static void store(uint8_t* target, Vector value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), value);
  }
  static void store_streaming(uint8_t* target, Vector value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), value);
  }
  static void fence() { _mm_sfence(); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static Vector low_word(uint64_t word) {
    return _mm256_zextsi128_si256(_mm_cvtsi64_si128(static_cast<int64_t>(word)));
  }
  static Vector broadcast(FoldConstants constants) {
    return _mm256_broadcastsi128_si256(
        _mm_set_epi64x(static_cast<int64_t>(constants.high), static_cast<int64_t>(constants.low)));
  }
  static Vector fold(Vector accumulator, Vector constants, Vector data) {
    return exclusive_or(exclusive_or(_mm256_clmulepi64_epi128(accumulator, constants, 0x00),
                                     _mm256_clmulepi64_epi128(accumulator, constants, 0x11)),
                        data);
  }
};

}  // namespace

const ChecksumKernel kVpclmul256Kernel = make_kernel<Vpclmul256>("vpclmul256");

}  // namespace kvx::crc64
