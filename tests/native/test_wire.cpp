// The frames: round trips, golden bytes, and that nothing but a frame is taken for one.
//
//   test_wire [seed]                  a random one where it is left out; it is printed
//   test_wire --samples DIRECTORY     writes the samples, for the corpus of tests/fuzz
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <random>
#include <string>

#include "wire_golden.h"
#include "wire_samples.h"

namespace {

std::atomic<size_t> largest_allocation{0};

}  // namespace

// Every allocation of this program is seen, so that a decoder that makes room for a count before it
// has looked at the bytes is found out.
void* operator new(size_t bytes) {
  largest_allocation = std::max(largest_allocation.load(), bytes);
  void* made = std::malloc(bytes);
  if (made == nullptr) std::abort();
  return made;
}
void operator delete(void* bytes) noexcept { std::free(bytes); }
void operator delete(void* bytes, size_t) noexcept { std::free(bytes); }

namespace {

using namespace kvx;
using namespace kvx::wire;

std::string hex(const Bytes& bytes) {
  std::string text;
  char two[3];
  for (const uint8_t byte : bytes) {
    std::snprintf(two, sizeof(two), "%02x", byte);
    text += two;
  }
  return text;
}

void test_golden_bytes() {
  const std::vector<Sample> all = samples();
  CHECK(all.size() == kGolden.size());
  for (size_t i = 0; i < all.size(); ++i) {
    CHECK(all[i].name == kGolden[i].first);
    if (hex(all[i].bytes) != kGolden[i].second) {
      std::fprintf(stderr, "%s is\n%s\n", all[i].name.c_str(), hex(all[i].bytes).c_str());
      std::abort();
    }
    CHECK(is_frame(all[i].bytes));
  }
}

// A frame that says it is as long as it is, whatever else it says.
void set_length(Bytes* bytes) {
  const auto length = static_cast<uint32_t>(bytes->size() - kHeaderBytes);
  std::memcpy(bytes->data() + 8, &length, sizeof(length));
}

bool has_free_length(const Sample& sample) {
  return sample.name == "greeting" || sample.name == "message" || sample.name == "note";
}

// Decodes a copy that lies alone on the heap, and holds what it allocated against its size.
bool is_frame_within_bounds(const Bytes& bytes) {
  const Bytes alone(bytes.begin(), bytes.end());
  largest_allocation = 0;
  const bool is_one = is_frame(alone);
  CHECK(largest_allocation <= 4 * bytes.size() + 64);
  return is_one;
}

void test_truncations() {
  for (const Sample& sample : samples()) {
    for (size_t cut = 0; cut < sample.bytes.size(); ++cut) {
      Bytes bytes(sample.bytes.begin(), sample.bytes.begin() + static_cast<ptrdiff_t>(cut));
      CHECK(!is_frame_within_bounds(bytes));
      if (cut < kHeaderBytes) continue;
      set_length(&bytes);
      CHECK(is_frame_within_bounds(bytes) == has_free_length(sample));
    }
    Bytes longer = sample.bytes;
    longer.push_back(0);
    CHECK(!is_frame_within_bounds(longer));
    set_length(&longer);
    CHECK(is_frame_within_bounds(longer) == has_free_length(sample));
  }
}

void test_flipped_bits() {
  int taken = 0;
  for (const Sample& sample : samples()) {
    for (size_t bit = 0; bit < sample.bytes.size() * 8; ++bit) {
      Bytes bytes = sample.bytes;
      bytes[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
      const bool is_one = is_frame_within_bounds(bytes);
      taken += is_one;
      // Magic, length and what is zero are looked at whole.
      const size_t at = bit / 8;
      if (at < 4 || (at >= 6 && at < 16)) CHECK(!is_one);
    }
  }
  CHECK(taken > 0);  // values are not checksummed: a flipped index is another index
}

void test_counts_are_held_against_bytes() {
  for (const uint32_t blocks : {uint32_t{0}, uint32_t{4}, uint32_t{1} << 20, ~uint32_t{0}}) {
    Bytes bytes = sample_read_indices();
    std::memcpy(bytes.data() + kHeaderBytes + 24, &blocks, sizeof(blocks));
    CHECK(!is_frame_within_bounds(bytes));
    bytes = sample_done();
    std::memcpy(bytes.data() + kHeaderBytes + 8, &blocks, sizeof(blocks));
    CHECK(!is_frame_within_bounds(bytes));
  }
}

void test_one_encoding() {
  // Descriptors of one shape in the long form.
  Bytes bytes = sample_read_each();
  std::memcpy(bytes.data() + kHeaderBytes + 40 + 32 + 8, bytes.data() + kHeaderBytes + 40 + 8, 24);
  CHECK(!is_frame(bytes));
  // A block that fails twice.
  Done done;
  done.failures = {{.block = 1, .code = Code::kStale}, {.block = 2, .code = Code::kStale}};
  bytes = frame(Type::kDone, 1, encode(done));
  CHECK(is_frame(bytes));
  bytes[kHeaderBytes + 16 + 12] = 1;
  CHECK(!is_frame(bytes));
}

void test_pieces_that_cannot_be() {
  const auto is_piece = [](uint64_t position, uint32_t bytes, uint32_t ends) {
    Bytes body(kPieceBytes + bytes + ends * kTrailerBytes);
    std::memcpy(body.data(), &position, sizeof(position));
    std::memcpy(body.data() + 8, &bytes, sizeof(bytes));
    std::memcpy(body.data() + 12, &ends, sizeof(ends));
    const bool fits = body.size() <= bytes_max(Type::kPiece);
    Bytes bytes_of = frame(Type::kMessage, 0, body);
    bytes_of[4] = static_cast<uint8_t>(Type::kPiece);
    return fits && is_frame(bytes_of);
  };
  CHECK(is_piece(0, 1, 1) && !is_piece(0, 1, 2) && !is_piece(0, 0, 0));
  CHECK(is_piece(INT64_MAX - 1, 1, 0) && !is_piece(INT64_MAX, 1, 0) && !is_piece(~0ULL, 1, 0));
  CHECK(is_piece(0, 5000, kEndsMax) && !is_piece(0, 5000, kEndsMax + 1));
  CHECK(is_piece(0, kPayloadBytesMax, 0) && !is_piece(0, kPayloadBytesMax + 1, 0));
}

void test_text_is_made_printable() {
  Done done{.code = Code::kStorage, .message = "a\nb\x80", .failures = {}, .checksums = {}};
  Done decoded;
  CHECK(decode(encode(done), &decoded) && decoded.message == "a?b?");
  done.message.assign(2 * kDoneTextMax, 'x');
  CHECK(decode(encode(done), &decoded) && decoded.message == std::string(kDoneTextMax, 'x'));
}

void test_limits_of_types() {
  for (int type = 0; type < 256; ++type) {
    Bytes bytes = frame(Type::kPing, 0, {});
    bytes[4] = static_cast<uint8_t>(type);
    Header header;
    const auto head = std::span<const uint8_t, kHeaderBytes>(bytes.data(), kHeaderBytes);
    for (const uint64_t length : {uint64_t{bytes_max(static_cast<Type>(type))},
                                  uint64_t{bytes_max(static_cast<Type>(type))} + 1}) {
      const auto length32 = static_cast<uint32_t>(length);
      std::memcpy(bytes.data() + 8, &length32, sizeof(length32));
      const bool exists = type >= 1 && type <= 13;
      CHECK(decode(head, &header) == (exists && length <= bytes_max(static_cast<Type>(type))));
    }
  }
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t any() { return engine_(); }
  uint64_t below(uint64_t end) { return engine_() % end; }
  bool coin() { return below(2) == 1; }
  // Often small, sometimes with every bit.
  int64_t number() { return static_cast<int64_t>(coin() ? below(1 << 16) : any()); }
  Bytes bytes(size_t count) {
    Bytes made(count);
    for (uint8_t& byte : made) byte = static_cast<uint8_t>(any());
    return made;
  }
  Code code() { return static_cast<Code>(below(13)); }
  std::vector<Descriptor> descriptors(size_t count) {
    std::vector<Descriptor> made(count);
    const bool is_one_shape = coin();
    for (size_t i = 0; i < count; ++i) {
      made[i] = {number(), number(), number(), number()};
      if (is_one_shape) made[i] = {made[i].offset, made[0].stride, made[0].count, made[0].bytes};
    }
    return made;
  }
  std::vector<uint64_t> words(size_t count) {
    std::vector<uint64_t> made(count);
    for (uint64_t& word : made) word = any();
    return made;
  }

 private:
  std::mt19937_64 engine_;
};

bool is_equal(const std::vector<Descriptor>& one, const std::vector<Descriptor>& other) {
  return std::ranges::equal(one, other, [](const Descriptor& a, const Descriptor& b) {
    return a.offset == b.offset && a.stride == b.stride && a.count == b.count && a.bytes == b.bytes;
  });
}

bool is_equal(const Request& one, const Request& other) {
  return one.lease.id == other.lease.id && one.lease.slot == other.lease.slot &&
         one.lease.generation == other.lease.generation && one.deadline_ms == other.deadline_ms &&
         one.wants_checksums == other.wants_checksums && one.indices == other.indices &&
         is_equal(one.descriptors, other.descriptors) && one.keys == other.keys &&
         one.note == other.note;
}

Request random_request(Random& random, size_t blocks) {
  Request request;
  request.lease = {random.any(), static_cast<uint32_t>(random.any()), random.any()};
  request.deadline_ms = static_cast<uint32_t>(random.any());
  request.wants_checksums = random.coin();
  if (random.coin()) {
    request.descriptors = random.descriptors(blocks);
  } else {
    for (size_t i = 0; i < blocks; ++i)
      request.indices.push_back(static_cast<uint32_t>(random.any()));
  }
  if (random.coin()) request.keys = random.bytes(blocks * kKeyBytes);
  request.note = random.bytes(random.below(200));
  return request;
}

// Decoded into something that was used before, as a connection does.
void round_trip_request(Random& random, Request* decoded, PullOrigin* decoded_origin) {
  const size_t blocks = 1 + random.below(random.coin() ? 4 : 300);
  const Request request = random_request(random, blocks);
  CHECK(decode(encode(request), decoded) && is_equal(*decoded, request));
  PullOrigin origin{.region = static_cast<uint32_t>(random.any()),
                    .lease_slot = static_cast<uint32_t>(random.any()),
                    .lease_generation = random.any()};
  origin.blocks = random.descriptors(blocks);
  if (random.coin()) origin.checksums = random.words(blocks);
  const Bytes body = encode(request, origin);
  CHECK(decode(body, decoded, decoded_origin) && is_equal(*decoded, request));
  CHECK(origin.region == decoded_origin->region && origin.lease_slot == decoded_origin->lease_slot);
  CHECK(origin.lease_generation == decoded_origin->lease_generation);
  CHECK(is_equal(origin.blocks, decoded_origin->blocks));
  CHECK(origin.checksums == decoded_origin->checksums);
  // One is not taken for the other.
  CHECK(!decode(body, decoded) && !decode(encode(request), decoded, decoded_origin));
  CHECK(is_frame(frame(Type::kPull, random.any(), body)));
}

void round_trip_done(Random& random, Done* decoded) {
  Done done{.code = random.code(), .message = "why", .failures = {}, .checksums = {}};
  for (uint32_t block = 0; block < random.below(300);
       block += 1 + static_cast<uint32_t>(random.below(5))) {
    done.failures.push_back({block, random.code(), static_cast<int32_t>(random.any())});
  }
  if (random.coin()) done.checksums = random.words(random.below(300));
  CHECK(decode(encode(done), decoded));
  CHECK(decoded->code == done.code && decoded->message == done.message);
  CHECK(decoded->checksums == done.checksums && decoded->failures.size() == done.failures.size());
  for (size_t i = 0; i < done.failures.size(); ++i) {
    CHECK(decoded->failures[i].block == done.failures[i].block);
    CHECK(decoded->failures[i].code == done.failures[i].code);
    CHECK(decoded->failures[i].error_number == done.failures[i].error_number);
  }
}

void round_trip_piece(Random& random) {
  Piece piece{.position = random.any() >> 2};
  piece.bytes = static_cast<uint32_t>(1 + random.below(2000));
  piece.ends = static_cast<uint32_t>(random.below(std::min(piece.bytes, kEndsMax) + 1));
  std::vector<Trailer> trailers(piece.ends);
  for (Trailer& trailer : trailers) trailer = {random.any(), random.code()};
  const Bytes body = piece_body(piece, random.bytes(piece.bytes), trailers);
  const uint8_t flags = random.coin() ? kToInitiator : uint8_t{0};
  const Bytes bytes = frame(Type::kPiece, random.any(), body, flags);
  CHECK(is_frame(bytes));
  Header header;
  Piece decoded;
  CHECK(decode(std::span(bytes).first<kHeaderBytes>(), &header) && header.flags == flags);
  CHECK(decode(std::span(body).first<kPieceBytes>(), header, &decoded));
  CHECK(decoded.position == piece.position && decoded.bytes == piece.bytes);
  CHECK(decoded.ends == piece.ends);
}

void test_round_trips(uint64_t seed) {
  Random random(seed);
  Request request;
  PullOrigin origin;
  Done done;
  for (int i = 0; i < 2000; ++i) {
    round_trip_request(random, &request, &origin);
    round_trip_done(random, &done);
    round_trip_piece(random);
  }
}

void test_largest_request() {
  Request request = sample_request();
  request.descriptors.resize(kBlocksMax);
  for (size_t i = 0; i < kBlocksMax; ++i) request.descriptors[i].bytes = static_cast<int64_t>(i);
  request.keys.resize(kBlocksMax * kKeyBytes);
  request.note.resize(kNoteBytesMax);
  PullOrigin origin{.blocks = request.descriptors, .checksums = std::vector<uint64_t>(kBlocksMax)};
  CHECK(is_frame(frame(Type::kPull, 1, encode(request, origin))));
}

void write_samples(const std::string& directory) {
  for (const Sample& sample : samples()) {
    std::ofstream file(directory + "/" + sample.name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(sample.bytes.data()),
               static_cast<std::streamsize>(sample.bytes.size()));
    CHECK(file.good());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--samples") {
    write_samples(argv[2]);
    return 0;
  }
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  test_golden_bytes();
  test_truncations();
  test_flipped_bits();
  test_counts_are_held_against_bytes();
  test_one_encoding();
  test_pieces_that_cannot_be();
  test_text_is_made_printable();
  test_limits_of_types();
  test_round_trips(seed);
  test_largest_request();
  std::puts("wire: ok");
  return 0;
}
