#include "agent/openssl_context.h"

#include <fcntl.h>

#include <cerrno>
#include <cstring>

#include "agent/stream.h"

namespace kvx {

namespace {

// OpenSSL would ask at the terminal, and a server would hang there.
int refuse_password(char*, int, int, void*) { return -1; }

// OpenSSL's own text for a missing file does not name it.
Status look_at(const char* role, const std::string& path) {
  if (path.empty()) return {Code::kUsage, std::string("TLS needs the file of its ") + role};
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file) return Status::Ok();
  return {Code::kUsage, std::string("the TLS ") + role + " " + path + ": " + std::strerror(errno),
          errno};
}

}  // namespace

Status TlsContext::create(const TlsFiles& files, std::shared_ptr<TlsContext>* context) {
  std::shared_ptr<const tls::Api> api;
  if (Status status = tls::load_library(&api); !status.ok()) return status;
  auto made = std::make_shared<OpensslContext>(std::move(api), files);
  if (Status status = made->open(); !status.ok()) return status;
  *context = std::move(made);
  return Status::Ok();
}

Status OpensslContext::open() {
  api_->error_clear();
  context_ = api_->context_new(api_->method());
  if (context_ == nullptr) {
    return {Code::kUnavailable, "OpenSSL makes no context: " + tls::take_errors(*api_) +
                                    "; check its openssl.cnf and OPENSSL_CONF"};
  }
  if (Status status = restrict_protocol(); !status.ok()) return status;
  return load_files();
}

Status OpensslContext::restrict_protocol() {
  const tls::Api& api = *api_;
  // Nothing is resumed: who a peer is gets proved each time, and connections are few and long.
  if (api.context_control(context_, tls::kControlMinProtoVersion, tls::kTls13, nullptr) != 1 ||
      api.context_control(context_, tls::kControlMaxProtoVersion, tls::kTls13, nullptr) != 1 ||
      api.context_set_tickets(context_, 0) != 1) {
    return {Code::kUnavailable, "this OpenSSL has TLS 1.3 switched off: " + tls::take_errors(api) +
                                    "; check its openssl.cnf and OPENSSL_CONF"};
  }
  api.context_control(context_, tls::kControlSessionCacheMode, tls::kSessionCacheOff, nullptr);
  api.context_control(context_, tls::kControlMode,
                      tls::kModePartialWrite | tls::kModeMovingWriteBuffer, nullptr);
  api.context_set_verify(context_, tls::kVerifyPeer | tls::kVerifyFailIfNone, nullptr);
  api.context_set_password(context_, refuse_password);
  return Status::Ok();
}

Status OpensslContext::load_files() {
  const tls::Api& api = *api_;
  const auto refused = [&](const char* role, const std::string& path, const char* remedy) {
    return Status(Code::kUsage, std::string("the TLS ") + role + " " + path + ": " +
                                    tls::take_errors(api) + remedy);
  };
  for (const auto& [role, path] :
       {std::pair{"certificate", &files_.certificate},
        std::pair{"private key", &files_.private_key}, std::pair{"authority", &files_.authority}}) {
    if (Status status = look_at(role, *path); !status.ok()) return status;
  }
  if (api.context_use_chain(context_, files_.certificate.c_str()) != 1) {
    return refused("certificate", files_.certificate,
                   "; it has to be PEM, the certificate first and then its chain");
  }
  // Whether it belongs to the certificate is looked at here too.
  if (api.context_use_key(context_, files_.private_key.c_str(), tls::kFilePem) != 1 ||
      api.context_check_key(context_) != 1) {
    return refused("private key", files_.private_key,
                   "; it has to be PEM, without a password, and that of the certificate");
  }
  if (api.context_load_authority(context_, files_.authority.c_str(), nullptr) != 1) {
    return refused("authority", files_.authority,
                   "; it has to be PEM, of one or more certificates");
  }
  return Status::Ok();
}

}  // namespace kvx
