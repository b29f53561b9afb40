// TLS for agents' connections, by the libssl that the machine has; see shim/tls.
#pragma once

#include <memory>
#include <string>

#include "agent/stream.h"
#include "kvx/tls_context.h"

namespace kvx {

// The handshake is made by the first calls of receive() and send(). `host` is whom a client
// expects: a name or an address of the certificate; empty for a server.
Status make_tls_stream(UniqueFd fd, std::shared_ptr<TlsContext> context, bool is_server,
                       const std::string& host, std::unique_ptr<Stream>* stream);

}  // namespace kvx
