#include "agent/tls.h"

namespace kvx {

Status TlsContext::create(const TlsFiles&, std::shared_ptr<TlsContext>*) {
  return {Code::kUnavailable, "TLS is not built in"};
}

Status make_tls_stream(UniqueFd, std::shared_ptr<TlsContext>, bool, const std::string&,
                       std::unique_ptr<Stream>*) {
  return {Code::kUnavailable, "TLS is not built in"};
}

}  // namespace kvx
