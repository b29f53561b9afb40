// Certificates of a test's own, made by the `openssl` command.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

#include "check.h"
#include "kvx/tls_context.h"
#include "stream_pairs.h"

namespace kvx {

class Certificates {
 public:
  static bool can_make() { return run("openssl version"); }

  // An authority that signs itself.
  void add_authority(const std::string& name) const {
    CHECK(run("openssl req -x509 " + kNewKey + file(name, "key") + " -out " + file(name, "pem") +
              " -days 2 -subj /CN=kvx-" + name));
  }
  // "peer", signed by "authority", for `subject_names` ("DNS:localhost,IP:127.0.0.1").
  void add(const std::string& name, const std::string& authority, const std::string& subject_names,
           int days = 2, const std::string& usage = "serverAuth,clientAuth") const {
    std::ofstream(directory_ / (name + ".ext"))
        << "subjectAltName=" << subject_names << "\nextendedKeyUsage=" << usage << "\n";
    CHECK(run("openssl req " + kNewKey + file(name, "key") + " -out " + file(name, "csr") +
              " -subj /CN=kvx-" + name));
    const std::string sign = "openssl x509 -req -in " + file(name, "csr") + " -CA " +
                             file(authority, "pem") + " -CAkey " + file(authority, "key") +
                             " -CAcreateserial -extfile " + file(name, "ext") + " -out " +
                             file(name, "pem");
    // Not every version takes a negative number of days; those that do not take dates.
    CHECK(run(sign + " -days " + std::to_string(days)) ||
          (days < 0 && run(sign + " -not_before 20200101000000Z -not_after 20200102000000Z")));
  }
  TlsFiles files(const std::string& name, const std::string& authority) const {
    return {.certificate = file(name, "pem"),
            .private_key = file(name, "key"),
            .authority = file(authority, "pem")};
  }
  std::shared_ptr<TlsContext> context(const std::string& name, const std::string& authority) const {
    std::shared_ptr<TlsContext> made;
    const Status status = TlsContext::create(files(name, authority), &made);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
    CHECK(status.ok());
    return made;
  }
  std::string file(const std::string& name, const std::string& suffix) const {
    return directory_ / (name + "." + suffix);
  }
  static bool run(const std::string& command) {
    return std::system((command + " >/dev/null 2>&1 </dev/null").c_str()) == 0;
  }

 private:
  const std::string kNewKey = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ";
  TestDirectory directory_;
};

}  // namespace kvx
