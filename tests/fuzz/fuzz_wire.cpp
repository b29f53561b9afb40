// Any bytes, taken for a frame: refused, or within the limits and what encode() makes of the
// result.
//
// See .ci/fuzz. Seeds: test_wire --samples tests/fuzz/corpus/wire.
#include <cstdint>

#include "wire_frames.h"

namespace {

using namespace kvx::wire;

// Most mutations break magic or length first. Mended, they get as far as the body.
void mend(Bytes* bytes) {
  const auto length = static_cast<uint32_t>(bytes->size() - kHeaderBytes);
  std::memcpy(bytes->data(), &kMagic, sizeof(kMagic));
  std::memcpy(bytes->data() + 8, &length, sizeof(length));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, data + size);
  if (is_frame(bytes) || size < kHeaderBytes) return 0;
  mend(&bytes);
  (void)is_frame(bytes);
  return 0;
}
