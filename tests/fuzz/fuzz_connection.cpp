// Any bytes, taken for what a peer streams: cut into frames and received into memory, in whatever
// portions, while transfers end and are forgotten in between. Nothing outside of their blocks is
// written, nothing after they may not be, and what is said to have arrived is there.
//
// An input is a byte of how many choices follow, the choices, and the stream. See .ci/fuzz.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>

#include "agent/receiver.h"
#include "wire_frames.h"

namespace {

using namespace kvx;

constexpr size_t kArenaBytes = 9472;
constexpr uint8_t kGuard = 0xA5;
constexpr size_t kChoicesMax = 64;
constexpr uint64_t kSinks = 4;

struct Choices {
  std::span<const uint8_t> left;
  uint8_t next() {
    if (left.empty()) return 0;
    const uint8_t one = left.front();
    left = left.subspan(1);
    return one;
  }
};

// Whole, strided and single-byte blocks, with room between them that belongs to nobody.
const std::vector<Descriptor>& blocks_of(uint64_t sink) {
  static const std::array<std::vector<Descriptor>, kSinks> all = {{
      {{16, 0, 1, 64}, {96, 0, 1, 1}, {112, 0, 1, 300}},
      {{1024, 32, 8, 16}, {2048, 100, 3, 50}},
      {{4096, 0, 1, 2048}},
      {{8192, 2, 200, 1}, {9000, 0, 1, 7}, {9100, 0, 1, 7}, {9200, 0, 1, 7}},
  }};
  return all[sink % kSinks];
}

uint64_t checksum_of(const uint8_t* base, const Descriptor& block) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  uint64_t state = block_seed(key_at({}, 0), static_cast<uint64_t>(block.total()));
  for (int64_t row = 0; row < block.count; ++row) {
    state = kernel.update(state, base + block.offset + row * block.stride,
                          static_cast<size_t>(block.bytes));
  }
  return state;
}

class WatchedSink : public Sink {
 public:
  WatchedSink(uint8_t* base, uint64_t number, bool knows)
      : Sink(base, blocks_of(number), {}), knows_(knows) {}

  bool may_write() const override { return may_write_; }
  void end() { may_write_ = false; }
  int64_t settled() const { return settled_; }

 protected:
  void settle(int64_t block, uint64_t checksum, Code code) override {
    CHECK(block == settled_++);  // in order, each once
    if (code != Code::kOk) return;
    CHECK(checksum_of(base(), blocks()[static_cast<size_t>(block)]) == checksum);
  }
  // What lies there, as if it were what was promised: so some blocks arrive well.
  bool expects(int64_t block, uint64_t* checksum) const override {
    if (knows_) *checksum = checksum_of(base(), blocks()[static_cast<size_t>(block)]);
    return knows_;
  }

 private:
  const bool knows_;
  bool may_write_ = true;
  int64_t settled_ = 0;
};

// Gives the stream in portions that the choices say.
class Portions : public Stream {
 public:
  Portions(std::span<const uint8_t> bytes, Choices* choices) : left_(bytes), choices_(choices) {}

  ssize_t receive(std::span<const iovec> target, std::vector<UniqueFd>*) override {
    CHECK(!target.empty());
    if (is_waiting_) {
      is_waiting_ = false;
      return -EAGAIN;
    }
    const uint8_t choice = choices_->next();
    is_waiting_ = (choice & 1) != 0;
    size_t room = choice < 2 ? left_.size() : size_t{choice};
    room = std::min(room, left_.size());
    size_t given = 0;
    for (const iovec& row : target) {
      CHECK(row.iov_len > 0);
      const size_t some = std::min(row.iov_len, room - given);
      if (some > 0) std::memcpy(row.iov_base, left_.data() + given, some);
      given += some;
    }
    left_ = left_.subspan(given);
    return static_cast<ssize_t>(given);
  }
  ssize_t send(std::span<const iovec>, int) override { return -EAGAIN; }
  int fd() const override { return -1; }
  bool is_at_end() const { return left_.empty(); }

 private:
  std::span<const uint8_t> left_;
  Choices* choices_;
  bool is_waiting_ = false;
};

class WatchedHandler : public FrameHandler {
 public:
  WatchedHandler(uint8_t* base, Choices* choices) : choices_(choices) {
    const uint8_t known = choices->next();
    for (uint64_t number = 0; number < kSinks; ++number) {
      sinks_[number] = std::make_unique<WatchedSink>(base, number, (known >> number & 1) != 0);
    }
  }

  bool accepts(const wire::Header& header) override {
    CHECK(header.bytes <= wire::bytes_max(header.type));
    return true;
  }
  bool defers(const wire::Header&) override {
    is_paused_ = choices_->next() == 0xFF;
    return is_paused_;
  }
  bool on_frame(const wire::Header& header, std::span<const uint8_t> body,
                std::vector<UniqueFd>&) override {
    CHECK(!is_paused_ && header.type != wire::Type::kPiece && body.size() == header.bytes);
    is_paused_ = choices_->next() == 0xFE;
    return wire::check_body(header, body);
  }
  Sink* sink_of(const wire::Header& header, const wire::Piece& piece, bool* is_wrong) override {
    CHECK(piece.bytes >= 1 && piece.bytes <= wire::kPayloadBytesMax);
    CHECK(piece.ends <= wire::kEndsMax && !*is_wrong);
    const auto found = sinks_.find(header.id);
    return found == sinks_.end() ? nullptr : found->second.get();
  }
  bool is_paused() const override { return is_paused_; }
  void on_piece_end(const wire::Header& header) override {
    const auto found = sinks_.find(header.id);
    CHECK(found != sinks_.end() && found->second->waiting() == 0);
    CHECK(found->second->position() <= found->second->total());
    if (!found->second->is_complete()) return;
    CHECK(found->second->settled() == static_cast<int64_t>(blocks_of(header.id).size()));
    sinks_.erase(found);  // the receiver has let go of it
  }

  // Between two calls of receive(): a transfer ends, or is forgotten altogether.
  void meddle(Receiver* receiver) {
    is_paused_ = false;
    const uint8_t choice = choices_->next();
    const auto found = sinks_.find(choice % kSinks);
    if (found == sinks_.end() || (choice & 0xC0) == 0) return;
    found->second->end();
    if ((choice & 0x80) == 0) return;
    receiver->forget(found->second.get());
    sinks_.erase(found);
  }

 private:
  Choices* choices_;
  std::map<uint64_t, std::unique_ptr<WatchedSink>> sinks_;
  bool is_paused_ = false;
};

// What belongs to no block.
std::vector<Descriptor> gaps() {
  std::vector<uint8_t> is_taken(kArenaBytes);
  for (uint64_t number = 0; number < kSinks; ++number) {
    for (const Descriptor& block : blocks_of(number)) {
      for (int64_t row = 0; row < block.count; ++row) {
        std::memset(is_taken.data() + block.offset + row * block.stride, 1,
                    static_cast<size_t>(block.bytes));
      }
    }
  }
  std::vector<Descriptor> found;
  for (size_t at = 0; at < kArenaBytes; ++at) {
    if (is_taken[at] != 0) continue;
    const bool continues = !found.empty() && found.back().end() == static_cast<int64_t>(at);
    if (!continues) found.push_back({static_cast<int64_t>(at), 0, 1, 0});
    ++found.back().bytes;
  }
  return found;
}

void check_guards(const std::vector<uint8_t>& arena) {
  static const std::vector<Descriptor> guarded = gaps();
  static const std::vector<uint8_t> untouched(kArenaBytes, kGuard);
  for (const Descriptor& gap : guarded) {
    CHECK(std::memcmp(arena.data() + gap.offset, untouched.data(),
                      static_cast<size_t>(gap.bytes)) == 0);
  }
}

// Most mutations break a header. Mended, the stream goes on behind it.
void mend(std::span<uint8_t> stream) {
  while (stream.size() >= wire::kHeaderBytes) {
    std::memcpy(stream.data(), &wire::kMagic, sizeof(wire::kMagic));
    stream[4] = static_cast<uint8_t>(stream[4] % 13 + 1);
    stream[5] = stream[4] == static_cast<uint8_t>(wire::Type::kPiece) ? stream[5] & 1 : 0;
    std::memset(stream.data() + 6, 0, 2);
    std::memset(stream.data() + 12, 0, 4);
    uint32_t length;
    std::memcpy(&length, stream.data() + 8, sizeof(length));
    length &= 0x0FFF;
    std::memcpy(stream.data() + 8, &length, sizeof(length));
    if (stream[4] == static_cast<uint8_t>(wire::Type::kPiece)) {
      std::memset(stream.data() + 17, 0, 7);
      stream[16] = static_cast<uint8_t>(stream[16] % (kSinks + 1));
    }
    const size_t whole = wire::kHeaderBytes + length;
    if (whole >= stream.size()) return;
    stream = stream.subspan(whole);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t count = std::min<size_t>(data[0] % kChoicesMax, size - 1);
  Choices choices{{data + 1, count}};
  std::vector<uint8_t> bytes(data + 1 + count, data + size);
  if (data[0] >= 128) mend(bytes);

  std::vector<uint8_t> arena(kArenaBytes, kGuard);
  WatchedHandler handler(arena.data(), &choices);
  Portions stream(bytes, &choices);
  Receiver receiver;
  int64_t total = 0;
  // Every call takes a byte, a choice, or is the one that finds the end.
  for (size_t turn = 0; turn < 2 * bytes.size() + 2 * kChoicesMax + 4; ++turn) {
    const int64_t received = receiver.receive(stream, handler, 512);
    if (received < 0) break;
    total += received;
    handler.meddle(&receiver);
  }
  CHECK(total <= static_cast<int64_t>(bytes.size()) && !receiver.failure().empty());
  check_guards(arena);
  return 0;
}
