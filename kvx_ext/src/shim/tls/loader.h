// Finds the OpenSSL of this machine and its entry points. Nothing of OpenSSL is linked.
#pragma once

#include <memory>
#include <string>

#include "kvx/status.h"
#include "shim/tls/abi.h"

namespace kvx::tls {

// Loads libssl.so.3, or libssl.so.1.1, and with it the libcrypto that it belongs to; where the
// process has one of them loaded already (Python's ssl), it is that one. It stays loaded for good:
// it has handlers that run at exit. kUnavailable says what is missing and what to do about it.
Status load_library(std::shared_ptr<const Api>* api);

// The errors that this thread's calls left, oldest first, as one line; forgets them. Empty when
// there are none.
std::string take_errors(const Api& api);

}  // namespace kvx::tls
