// Certificates and keys for agents' connections. TLS 1.3 only; nothing is resumed.
//
// Both sides present a certificate that `authority` has signed; the one that dials also holds it
// against the name or address that it dialled (subjectAltName). A certificate with an
// extendedKeyUsage needs serverAuth and clientAuth, for an agent is both. Revocation lists are not
// consulted: use short-lived certificates. Files are read once, here.
#pragma once

#include <memory>
#include <string>

#include "kvx/status.h"

namespace kvx {

struct TlsFiles {
  std::string certificate;  // PEM, with its chain
  std::string private_key;  // PEM
  std::string authority;    // PEM: who signs the certificates of peers; both sides present one
};

class TlsContext {
 public:
  // kUnavailable: there is no libssl here, and how to get it; kUsage: a file is missing or wrong,
  // naming it.
  static Status create(const TlsFiles& files, std::shared_ptr<TlsContext>* context);
  virtual ~TlsContext() = default;
};

}  // namespace kvx
