// A stream through OpenSSL. OpenSSL never sees the socket: it reads and writes one end of a pair of
// rings, and this moves bytes between the other end and the socket. So a write raises no signal,
// every system call is ours to explain, and OpenSSL never holds a half-sent record that has to be
// offered again.
#include "agent/tls.h"

#include <arpa/inet.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <string>

#include "agent/openssl_context.h"

namespace kvx {

namespace {

constexpr size_t kRingBytes = 128 << 10;  // of ciphertext, each way
constexpr size_t kRecordBytesMax = 16 << 10;
// What a record grows by, and then some: header, tag, type, padding.
constexpr size_t kOverheadBytes = 512;

// Bytes of a list of buffers, taken from the front.
class Parts {
 public:
  explicit Parts(std::span<const iovec> parts) : parts_(parts) { skip_empty(); }

  bool is_empty() const { return parts_.empty(); }
  uint8_t* data() const { return static_cast<uint8_t*>(parts_[0].iov_base) + done_; }
  size_t bytes() const { return parts_[0].iov_len - done_; }
  bool is_last() const { return parts_.size() == 1; }
  // REQUIRES: count <= bytes().
  void take(size_t count) {
    done_ += count;
    skip_empty();
  }

 private:
  void skip_empty() {
    while (!parts_.empty() && done_ == parts_[0].iov_len) {
      parts_ = parts_.subspan(1);
      done_ = 0;
    }
  }

  std::span<const iovec> parts_;
  size_t done_ = 0;
};

const char* verify_remedy(long result) {
  switch (result) {
    case tls::kVerifyNotYetValid:
    case tls::kVerifyExpired:
      return "; renew the other side's certificate, or set the clock of this machine";
    case tls::kVerifySelfSigned:
    case tls::kVerifySelfSignedInChain:
    case tls::kVerifyNoIssuer:
    case tls::kVerifyNoFirst:
      return "; the other side's certificate is not signed by the authority given here";
    case tls::kVerifyPurpose:
      return "; its extendedKeyUsage needs both serverAuth and clientAuth";
    case tls::kVerifyHostMismatch:
    case tls::kVerifyAddressMismatch:
      return "; give the other side's certificate a subjectAltName for what is dialled";
    default:
      return "";
  }
}

class TlsStream final : public Stream {
 public:
  TlsStream(UniqueFd fd, std::shared_ptr<const OpensslContext> context)
      : fd_(std::move(fd)), context_(std::move(context)), api_(context_->api()) {}
  ~TlsStream() override;
  TlsStream(const TlsStream&) = delete;
  TlsStream& operator=(const TlsStream&) = delete;

  Status open(bool is_server, const std::string& host);

  ssize_t receive(std::span<const iovec> target, std::vector<UniqueFd>* fds) override;
  ssize_t send(std::span<const iovec> source, int passed_fd) override;
  std::string failure() const override { return failure_; }
  // What poll does not know of: plaintext that OpenSSL holds, and ciphertext in the ring.
  bool has_buffered() const override {
    return api_.session_pending(session_) > 0 || api_.bio_pending(inner_) > 0;
  }
  bool wants_read_to_send() const override { return wants_read_to_send_; }
  bool wants_write_to_receive() const override { return has_unsent(); }
  bool is_encrypted() const override { return true; }
  int fd() const override { return fd_.get(); }

 private:
  bool has_unsent() const { return api_.bio_pending(outer_) > 0; }
  ssize_t flush();
  ssize_t fill();
  ssize_t advance(int result);
  ssize_t write_all(Parts* parts);
  std::span<const uint8_t> next_record(Parts* parts);
  ssize_t fail(int error, std::string text);
  ssize_t fail_system(int error);
  ssize_t fail_tls();
  void hear_reason();
  Status expect(const std::string& host);

  const UniqueFd fd_;
  const std::shared_ptr<const OpensslContext> context_;
  const tls::Api& api_;
  tls::Session* session_ = nullptr;
  tls::Bio* inner_ = nullptr;  // OpenSSL's end; belongs to the session
  tls::Bio* outer_ = nullptr;
  std::string host_;  // whom a client expects
  std::string failure_;
  ssize_t broken_ = 0;      // the errno of every call from now on
  bool has_ended_ = false;  // the other side sends no more ciphertext
  bool wants_read_to_send_ = false;
  // The last byte that OpenSSL has taken and the caller was not told of: while ciphertext waits in
  // the ring, the caller has to have a reason to come back.
  bool is_byte_owed_ = false;
  std::array<uint8_t, kRecordBytesMax> scratch_;
};

TlsStream::~TlsStream() {
  if (session_ != nullptr) {
    // Says that this is the end, and no cut. As far as the socket takes it: nobody waits here.
    if (broken_ == 0 && api_.session_is_made(session_) != 0) {
      api_.error_clear();
      (void)api_.session_shutdown(session_);
      (void)flush();
    }
    api_.error_clear();
    api_.session_free(session_);
  }
  if (outer_ != nullptr) api_.bio_free(outer_);
}

Status TlsStream::open(bool is_server, const std::string& host) {
  host_ = host;
  api_.error_clear();
  session_ = api_.session_new(context_->get());
  if (session_ == nullptr || api_.bio_pair(&inner_, kRingBytes, &outer_, kRingBytes) != 1) {
    return {Code::kCapacity, "OpenSSL makes no connection: " + tls::take_errors(api_)};
  }
  api_.session_set_bio(session_, inner_, inner_);
  if (is_server) {
    api_.session_accept(session_);
    return Status::Ok();
  }
  api_.session_connect(session_);
  return expect(host);
}

Status TlsStream::expect(const std::string& host) {
  tls::Expectation* expectation = api_.session_expectation(session_);
  api_.expect_flags(expectation, tls::kNoPartialWildcards);
  std::array<uint8_t, sizeof(in6_addr)> address;
  const std::string bare = host.substr(0, host.find('%'));  // fe80::1%eth0
  const bool is_address = inet_pton(AF_INET, bare.c_str(), address.data()) == 1 ||
                          inet_pton(AF_INET6, bare.c_str(), address.data()) == 1;
  const int is_set = is_address ? api_.expect_address(expectation, bare.c_str())
                                : api_.expect_host(expectation, host.data(), host.size());
  if (is_set == 1) return Status::Ok();
  return {Code::kUsage, "\"" + host + "\" is no name that a certificate could have"};
}

// Moves ciphertext out, as far as the socket takes it. 0, or a negative errno.
ssize_t TlsStream::flush() {
  char* bytes = nullptr;
  for (int count = api_.bio_look(outer_, &bytes); count > 0;
       count = api_.bio_look(outer_, &bytes)) {
    const ssize_t sent =
        ::send(fd_.get(), bytes, static_cast<size_t>(count), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return errno == EAGAIN ? 0 : -errno;
    (void)api_.bio_take(outer_, &bytes, static_cast<int>(sent));
  }
  return 0;
}

// Takes ciphertext in. Bytes, 0 for none any more, or a negative errno.
ssize_t TlsStream::fill() {
  if (has_ended_) return 0;
  char* bytes = nullptr;
  const int room = api_.bio_offer(outer_, &bytes);
  if (room <= 0) return -EAGAIN;  // OpenSSL has it all to read first
  ssize_t received = 0;
  do {
    received = ::recv(fd_.get(), bytes, static_cast<size_t>(room), MSG_DONTWAIT);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return -errno;
  has_ended_ = received == 0;
  if (received > 0) (void)api_.bio_put(outer_, &bytes, static_cast<int>(received));
  return received;
}

// What OpenSSL needs after a call that did nothing: positive, try again; else the caller's answer.
ssize_t TlsStream::advance(int result) {
  const int error = api_.session_error(session_, result);
  if (error != tls::kErrorWantRead && error != tls::kErrorWantWrite) {
    if (error == tls::kErrorZeroReturn) return 0;
    return fail_tls();
  }
  if (const ssize_t flushed = flush(); flushed < 0) return fail_system(static_cast<int>(-flushed));
  if (error == tls::kErrorWantWrite) return has_unsent() ? -EAGAIN : 1;
  const ssize_t filled = fill();
  if (filled > 0 || filled == -EAGAIN) return filled;
  if (filled < 0) return fail_system(static_cast<int>(-filled));
  const bool is_made = api_.session_is_made(session_) != 0;
  return fail(ECONNRESET, is_made ? "the connection was cut off: it ended without TLS's goodbye"
                                  : "the other side closed the connection during the TLS "
                                    "handshake: does it speak TLS, and what does its log say?");
}

ssize_t TlsStream::receive(std::span<const iovec> target, std::vector<UniqueFd>*) {
  if (broken_ != 0) return broken_;
  Parts parts(target);
  if (parts.is_empty()) return -EINVAL;
  ssize_t total = 0;
  ssize_t answer = 1;
  while (!parts.is_empty() && answer > 0) {
    const int wanted = static_cast<int>(std::min<size_t>(parts.bytes(), INT32_MAX));
    api_.error_clear();
    const int count = api_.session_read(session_, parts.data(), wanted);
    if (count > 0) {
      parts.take(static_cast<size_t>(count));
      total += count;
    } else {
      answer = advance(count);
    }
  }
  (void)flush();  // an answer of the handshake; that it failed is seen by the next call
  return total > 0 ? total : answer;
}

// At most a record's worth of what is next, in one piece.
std::span<const uint8_t> TlsStream::next_record(Parts* parts) {
  if (parts->bytes() >= kRecordBytesMax || parts->is_last()) {
    const std::span<const uint8_t> next(parts->data(), std::min(parts->bytes(), kRecordBytesMax));
    parts->take(next.size());
    return next;
  }
  size_t filled = 0;
  while (filled < scratch_.size() && !parts->is_empty()) {
    const size_t count = std::min(parts->bytes(), scratch_.size() - filled);
    std::memcpy(scratch_.data() + filled, parts->data(), count);
    parts->take(count);
    filled += count;
  }
  return {scratch_.data(), filled};
}

// Bytes that OpenSSL has taken, as many as the ring and the socket have room for.
ssize_t TlsStream::write_all(Parts* parts) {
  ssize_t total = 0;
  while (!parts->is_empty()) {
    // Never with less room than a record needs: OpenSSL takes all of it or nothing.
    if (api_.bio_room(inner_) < kRecordBytesMax + kOverheadBytes) {
      if (const ssize_t flushed = flush(); flushed < 0) {
        return fail_system(static_cast<int>(-flushed));
      }
      if (has_unsent()) break;
    }
    const std::span<const uint8_t> next = next_record(parts);
    api_.error_clear();
    int count = 0;
    while ((count = api_.session_write(session_, next.data(), static_cast<int>(next.size()))) <=
           0) {
      const ssize_t answer = advance(count);
      wants_read_to_send_ = answer == -EAGAIN && !has_unsent();
      if (answer == 0) return fail(EPIPE, "the other side has ended the connection");
      if (answer < 0) return total > 0 && answer == -EAGAIN ? total : answer;
      api_.error_clear();
    }
    assert(static_cast<size_t>(count) == next.size());
    total += count;
  }
  return total;
}

ssize_t TlsStream::send(std::span<const iovec> source, int passed_fd) {
  assert(passed_fd < 0);
  if (broken_ != 0) return broken_;
  wants_read_to_send_ = false;
  Parts parts(source);
  if (passed_fd >= 0 || parts.is_empty()) return -EINVAL;
  ssize_t total = 0;
  if (is_byte_owed_) {
    if (const ssize_t flushed = flush(); flushed < 0) {
      return fail_system(static_cast<int>(-flushed));
    }
    if (has_unsent()) return -EAGAIN;
    parts.take(1);
    total = 1;
    is_byte_owed_ = false;
  }
  const ssize_t written = write_all(&parts);
  if (written < 0) return total > 0 && written == -EAGAIN ? total : written;
  total += written;
  if (const ssize_t flushed = flush(); flushed < 0) return fail_system(static_cast<int>(-flushed));
  if (total == 0) return -EAGAIN;  // no room beside what is not the caller's
  if (!has_unsent() || written == 0) return total;
  is_byte_owed_ = true;
  return total > 1 ? total - 1 : -EAGAIN;
}

ssize_t TlsStream::fail(int error, std::string text) {
  failure_ = std::move(text);
  broken_ = -error;
  return broken_;
}

ssize_t TlsStream::fail_system(int error) {
  fail(error, std::string("the connection broke under TLS: ") + std::strerror(error));
  hear_reason();
  return broken_;
}

// A side that refuses the other says why and closes, and whoever still sends hears of the closing
// first.
void TlsStream::hear_reason() {
  (void)fill();
  if (api_.bio_pending(inner_) == 0) return;
  uint8_t byte = 0;
  api_.error_clear();
  const int result = api_.session_peek(session_, &byte, 1);
  if (result <= 0 && api_.session_error(session_, result) == tls::kErrorSsl) (void)fail_tls();
}

ssize_t TlsStream::fail_tls() {
  (void)flush();  // the alert that tells the other side why
  std::string text = tls::take_errors(api_);
  if (text.empty()) text = "OpenSSL gives no reason";
  const long result = api_.session_verify_result(session_);
  if (result != tls::kVerifyOk) {
    text += std::string(": ") + api_.verify_text(result) + verify_remedy(result);
    if (!host_.empty()) text += " (dialled as " + host_ + ")";
  } else if (text.find("alert") != std::string::npos) {
    text += "; the other side says so, its log has more";
  } else {
    text += "; does the other side speak TLS 1.3?";
  }
  return fail(EPROTO, "TLS failed: " + text);
}

}  // namespace

Status make_tls_stream(UniqueFd fd, std::shared_ptr<TlsContext> context, bool is_server,
                       const std::string& host, std::unique_ptr<Stream>* stream) {
  if (!is_server && host.empty()) {
    return {Code::kUsage, "a TLS client needs the name or address that it expects"};
  }
  // There is no other kind.
  auto made = std::make_unique<TlsStream>(
      std::move(fd), std::static_pointer_cast<const OpensslContext>(std::move(context)));
  if (Status status = made->open(is_server, host); !status.ok()) return status;
  *stream = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
