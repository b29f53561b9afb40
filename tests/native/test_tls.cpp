// TLS between two ends of one process: what goes in comes out, and whatever is wrong fails with a
// text and without a hang.
//
//   test_tls [seed]
#include <sys/wait.h>

#include <cstdio>
#include <cstring>
#include <thread>

#include "tls_certificates.h"
#include "tls_ends.h"

namespace {

using namespace kvx;

struct Scene {
  const Certificates& certificates;
  std::mt19937_64 random;
  std::shared_ptr<TlsContext> good;
};

struct Ends {
  End client;
  End server;
  std::vector<End*> both() { return {&client, &server}; }
};

Ends make_ends(const std::shared_ptr<TlsContext>& client, const std::shared_ptr<TlsContext>& server,
               const std::string& host) {
  SocketPair sockets = tcp_sockets();
  Ends ends;
  ends.client.stream = tls_end(std::move(sockets.one), client, false, host);
  ends.server.stream = tls_end(std::move(sockets.other), server, true, "");
  return ends;
}

std::vector<uint8_t> random_bytes(std::mt19937_64& random, size_t count) {
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

bool says(const End& end, const std::string& text) {
  const bool is_right = end.error < 0 && end.failure().find(text) != std::string::npos;
  if (!is_right) {
    std::fprintf(stderr, "wanted \"%s\": %zd: %s\n", text.c_str(), end.error,
                 end.failure().c_str());
  }
  return is_right;
}

void greet(Scene& scene, Ends& ends) {
  ends.client.out = {1, 2, 3};
  ends.server.out = {4, 5};
  drive(ends.both(), scene.random,
        [&] { return ends.client.in.size() == 2 && ends.server.in.size() == 3; });
}

void check_all_arrives(Scene& scene, Ends& ends, size_t bytes) {
  ends.client.out = random_bytes(scene.random, bytes);
  ends.server.out = random_bytes(scene.random, bytes);
  drive(ends.both(), scene.random, [&] {
    CHECK(!ends.client.is_over() && !ends.server.is_over());
    return ends.client.in.size() >= bytes && ends.server.in.size() >= bytes;
  });
  CHECK(ends.client.in == ends.server.out && ends.server.in == ends.client.out);
}

void test_round_trip(Scene& scene) {
  for (const char* host : {"localhost", "127.0.0.1", "::1"}) {
    Ends ends = make_ends(scene.good, scene.good, host);
    check_all_arrives(scene, ends, 8 << 20);
  }
}

// Buffers of the kernel that hold less than a record.
Ends make_narrow_ends(const std::shared_ptr<TlsContext>& client,
                      const std::shared_ptr<TlsContext>& server) {
  SocketPair sockets;
  CHECK(pair_sockets(&sockets.one, &sockets.other).ok());
  const int bytes = 1;  // the kernel takes its least
  for (const int fd : {sockets.one.get(), sockets.other.get()}) {
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)) == 0);
  }
  Ends ends;
  ends.client.stream = tls_end(std::move(sockets.one), client, false, "localhost");
  ends.server.stream = tls_end(std::move(sockets.other), server, true, "");
  return ends;
}

void test_small_buffers(Scene& scene) {
  for (const bool is_simple : {false, true}) {
    Ends ends = make_narrow_ends(scene.good, scene.good);
    ends.client.is_simple = ends.server.is_simple = is_simple;
    check_all_arrives(scene, ends, 1 << 20);
  }
  // The last bytes do not stay behind with the stream of one who has no more to send.
  Ends one_way = make_narrow_ends(scene.good, scene.good);
  one_way.client.is_simple = true;
  one_way.client.out = random_bytes(scene.random, 100000);
  drive(one_way.both(), scene.random, [&] { return one_way.server.in == one_way.client.out; });
  // A server that has nothing to say but a certificate that does not fit.
  Ends ends = make_narrow_ends(scene.good, scene.certificates.context("wide", "authority"));
  ends.client.out = {1, 2, 3};
  drive(ends.both(), scene.random, [&] { return ends.server.in.size() == 3; });
}

// What the streams say they wait for, one call at a time.
void test_wishes(Scene& scene) {
  Ends ends = make_ends(scene.good, scene.good, "localhost");
  CHECK(send_text(*ends.client.stream, "x") == -EAGAIN);
  CHECK(ends.client.stream->wants_read_to_send() && !ends.client.stream->wants_write_to_receive());
  greet(scene, ends);
  CHECK(!ends.client.stream->wants_read_to_send() && !ends.server.stream->has_buffered());
  // Three records, received by one who has room for one at a time.
  const std::string text(256, 'x');
  for (int i = 0; i < 3; ++i) CHECK(send_text(*ends.client.stream, text) == 256);
  CHECK(wait_for(ends.server.stream->fd(), POLLIN));
  std::string received;
  for (int i = 0; i < 3; ++i) {
    CHECK(i == 0 || ends.server.stream->has_buffered());
    CHECK(receive_text(*ends.server.stream, &received) == 256 && received == text);
  }
  CHECK(!ends.server.stream->has_buffered());
  CHECK(receive_text(*ends.server.stream, &received) == -EAGAIN);
}

// An end that says so is no cut.
void test_ends_in_order(Scene& scene) {
  Ends ends = make_ends(scene.good, scene.good, "localhost");
  greet(scene, ends);
  ends.client.out.resize(1000);
  drive(ends.both(), scene.random, [&] { return ends.client.sent == 1000; });
  ends.client.stream.reset();
  End* left[] = {&ends.server};
  drive(left, scene.random, [&] { return ends.server.is_over(); });
  CHECK(ends.server.is_closed && ends.server.error == 0 && ends.server.in.size() == 1000);
  // Sending into it fails, and raises no signal.
  ends.server.is_closed = false;
  ends.server.out.resize(64 << 20);
  drive(left, scene.random, [&] {
    ends.server.is_closed = false;
    return ends.server.error != 0;
  });
}

// Both ends fail, the one that refuses with `refuser` and the other with `refused`.
void check_refusal(Scene& scene, const std::shared_ptr<TlsContext>& client,
                   const std::shared_ptr<TlsContext>& server, const std::string& host,
                   const std::string& of_client, const std::string& of_server) {
  Ends ends = make_ends(client, server, host);
  ends.client.out = {1};
  ends.server.out = {2};
  drive(ends.both(), scene.random, [&] { return ends.client.is_over() && ends.server.is_over(); });
  CHECK(says(ends.client, of_client) && says(ends.server, of_server));
  CHECK(ends.server.in.empty());
  // It stays so.
  CHECK(!receive_some(ends.client, scene.random) && says(ends.client, of_client));
}

void test_wrong_authority(Scene& scene) {
  const Certificates& made = scene.certificates;
  check_refusal(scene, scene.good, made.context("stranger", "authority"), "localhost",
                "not signed by the authority", "alert unknown ca");
  check_refusal(scene, made.context("stranger", "authority"), scene.good, "localhost",
                "alert unknown ca", "not signed by the authority");
  check_refusal(scene, made.context("peer", "other_authority"), scene.good, "localhost",
                "not signed by the authority", "alert unknown ca");
}

void test_wrong_host(Scene& scene) {
  check_refusal(scene, scene.good, scene.good, "elsewhere", "dialled as elsewhere", "alert");
  check_refusal(scene, scene.good, scene.good, "127.0.0.2", "subjectAltName", "alert");
}

void test_expired(Scene& scene) {
  const std::shared_ptr<TlsContext> expired = scene.certificates.context("expired", "authority");
  check_refusal(scene, scene.good, expired, "localhost", "renew", "alert certificate expired");
  check_refusal(scene, expired, scene.good, "localhost", "alert certificate expired", "renew");
}

// Whoever only sends is told why, and not just that the other side is gone.
void test_reason_is_heard(Scene& scene) {
  Ends ends =
      make_ends(scene.certificates.context("expired", "authority"), scene.good, "localhost");
  ends.client.out = {1};
  drive(ends.both(), scene.random, [&] { return ends.server.error != 0; });
  ends.server.stream.reset();
  for (int i = 0; i < kPatienceMs && ends.client.error == 0; ++i) {
    const ssize_t sent = send_text(*ends.client.stream, "x");
    if (sent < 0 && sent != -EAGAIN) ends.client.error = sent;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(says(ends.client, "alert certificate expired"));
}

void test_wrong_usage(Scene& scene) {
  check_refusal(scene, scene.certificates.context("server_only", "authority"), scene.good,
                "localhost", "alert", "clientAuth");
}

// One end alone, against what is written to its socket; `is_ending`: and then it is closed.
void check_refuses_bytes(Scene& scene, bool is_server, const std::vector<uint8_t>& bytes,
                         bool is_ending, const std::string& text) {
  SocketPair sockets = tcp_sockets();
  End end;
  end.stream = tls_end(std::move(sockets.one), scene.good, is_server, is_server ? "" : "localhost");
  end.out = {1};
  CHECK(send(sockets.other.get(), bytes.data(), bytes.size(), 0) ==
        static_cast<ssize_t>(bytes.size()));
  if (is_ending) CHECK(shutdown(sockets.other.get(), SHUT_WR) == 0);
  End* alone[] = {&end};
  drive(alone, scene.random, [&] { return end.is_over(); });
  CHECK(says(end, text) && end.in.empty() && end.sent == 0);
}

void test_plaintext_and_garbage(Scene& scene) {
  const std::string frame("kvx1\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24);
  for (const bool is_server : {true, false}) {
    check_refuses_bytes(scene, is_server, std::vector<uint8_t>(frame.begin(), frame.end()), false,
                        "does the other side speak TLS");
    for (int i = 0; i < 50; ++i) {
      check_refuses_bytes(scene, is_server, random_bytes(scene.random, 1 + scene.random() % 500),
                          true, "TLS");
    }
  }
}

std::vector<uint8_t> first_flight(Scene& scene) {
  SocketPair sockets = tcp_sockets();
  const std::unique_ptr<Stream> client =
      tls_end(std::move(sockets.one), scene.good, false, "localhost");
  std::string text;
  CHECK(receive_text(*client, &text) == -EAGAIN && wait_for(sockets.other.get(), POLLIN));
  std::vector<uint8_t> bytes(4096);
  const ssize_t count = recv(sockets.other.get(), bytes.data(), bytes.size(), 0);
  CHECK(count > 0);
  bytes.resize(static_cast<size_t>(count));
  return bytes;
}

void test_cut_off(Scene& scene) {
  const std::vector<uint8_t> hello = first_flight(scene);
  for (size_t cut = 0; cut <= hello.size(); cut += 1 + scene.random() % 16) {
    check_refuses_bytes(
        scene, true,
        std::vector<uint8_t>(hello.begin(), hello.begin() + static_cast<ptrdiff_t>(cut)), true,
        "during the TLS handshake");
  }
  Ends ends = make_ends(scene.good, scene.good, "localhost");
  greet(scene, ends);
  CHECK(shutdown(ends.client.stream->fd(), SHUT_WR) == 0);
  End* left[] = {&ends.server};
  drive(left, scene.random, [&] { return ends.server.is_over(); });
  CHECK(says(ends.server, "cut off"));
}

// Behind the handshake, a byte that the other end did not encrypt.
void test_tampering(Scene& scene) {
  for (int i = 0; i < 20; ++i) {
    Ends ends = make_ends(scene.good, scene.good, "localhost");
    greet(scene, ends);
    const std::vector<uint8_t> garbage = random_bytes(scene.random, 100);
    CHECK(send(ends.client.stream->fd(), garbage.data(), garbage.size(), 0) == 100);
    CHECK(shutdown(ends.client.stream->fd(), SHUT_WR) == 0);
    End* left[] = {&ends.server};
    drive(left, scene.random, [&] { return ends.server.is_over(); });
    CHECK(ends.server.error < 0 && !ends.server.failure().empty() && ends.server.in.size() == 3);
  }
}

// Another implementation's idea of a client: an older protocol, and no certificate.
void test_foreign_clients(Scene& scene) {
  for (const auto& [option, text] : {std::pair{"-tls1_2", "unsupported protocol"},
                                     std::pair{"-tls1_3", "peer did not return a certificate"}}) {
    UniqueFd listener;
    int port = 0;
    CHECK(listen_tcp_socket("127.0.0.1", 0, &listener, &port).ok());
    std::thread client([&, command = std::string(option)] {
      CHECK(!Certificates::run("openssl s_client -connect 127.0.0.1:" + std::to_string(port) + " " +
                               command + " -quiet -verify_quiet"));
    });
    CHECK(wait_for(listener.get(), POLLIN));
    std::string address;
    End server;
    server.stream = tls_end(accept_socket(listener.get(), &address), scene.good, true, "");
    End* alone[] = {&server};
    drive(alone, scene.random, [&] { return server.is_over(); });
    CHECK(says(server, text));
    server.stream.reset();
    client.join();
  }
}

bool refuses(const TlsFiles& files, const std::string& text) {
  std::shared_ptr<TlsContext> context;
  const Status status = TlsContext::create(files, &context);
  const bool is_right = status.code() == Code::kUsage && context == nullptr &&
                        status.message().find(text) != std::string::npos;
  if (!is_right) std::fprintf(stderr, "%s\n", status.message().c_str());
  return is_right;
}

// Somebody stands ready to type the password in: nobody asks.
bool refuses_without_asking(const TlsFiles& files) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    int input[2];
    const bool is_ready = setsid() > 0 && pipe(input) == 0 && write(input[1], "secret\n", 7) == 7 &&
                          dup2(input[0], STDIN_FILENO) == STDIN_FILENO;
    _exit(is_ready && refuses(files, "without a password") ? 0 : 1);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && status == 0;
}

void test_wrong_files(Scene& scene) {
  const Certificates& made = scene.certificates;
  TlsFiles files = made.files("peer", "authority");
  CHECK(Certificates::run("openssl ec -aes128 -passout pass:secret -in " + files.private_key +
                          " -out " + made.file("locked", "key")));
  files.private_key = made.file("locked", "key");
  CHECK(refuses_without_asking(files));
  files.private_key = made.file("stranger", "key");
  CHECK(refuses(files, "that of the certificate"));
  files = made.files("peer", "authority");
  files.certificate = made.file("none", "pem");
  CHECK(refuses(files, made.file("none", "pem") + ": No such file"));
  files.certificate = made.file("peer", "ext");
  CHECK(refuses(files, "certificate " + made.file("peer", "ext")));
  files = made.files("peer", "authority");
  files.authority = made.file("peer", "key");
  CHECK(refuses(files, "the TLS authority"));
  files.authority = "";
  CHECK(refuses(files, "needs the file"));
}

void run(uint64_t seed) {
  const Certificates certificates;
  certificates.add_authority("authority");
  certificates.add_authority("other_authority");
  certificates.add("peer", "authority", "DNS:localhost,IP:127.0.0.1,IP:::1");
  certificates.add("stranger", "other_authority", "DNS:localhost");
  std::string wide = "DNS:localhost";
  for (int i = 0; i < 1000; ++i) wide += ",DNS:name-" + std::to_string(i) + ".example";
  certificates.add("wide", "authority", wide);
  certificates.add("expired", "authority", "DNS:localhost", -1);
  certificates.add("server_only", "authority", "DNS:localhost", 2, "serverAuth");
  Scene scene{certificates, std::mt19937_64(seed), certificates.context("peer", "authority")};
  test_round_trip(scene);
  test_small_buffers(scene);
  test_wishes(scene);
  test_ends_in_order(scene);
  test_wrong_authority(scene);
  test_wrong_host(scene);
  test_expired(scene);
  test_reason_is_heard(scene);
  test_wrong_usage(scene);
  test_plaintext_and_garbage(scene);
  test_cut_off(scene);
  test_tampering(scene);
  test_foreign_clients(scene);
  test_wrong_files(scene);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  if (!Certificates::can_make()) {
    std::puts("tls: skipped, certificates are made by the `openssl` command and there is none");
    return 0;
  }
  std::shared_ptr<TlsContext> context;
  const Status status = TlsContext::create({}, &context);
  if (status.code() == Code::kUnavailable) {
    std::printf("tls: skipped, %s\n", status.message().c_str());
    return 0;
  }
  run(seed);
  std::puts("tls: ok");
  return 0;
}
