// A TlsContext is this: OpenSSL's, and the functions to use it with.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "kvx/tls_context.h"
#include "shim/tls/loader.h"

namespace kvx {

class OpensslContext final : public TlsContext {
 public:
  OpensslContext(std::shared_ptr<const tls::Api> api, TlsFiles files)
      : api_(std::move(api)), files_(std::move(files)) {}
  ~OpensslContext() override {
    if (context_ != nullptr) api_->context_free(context_);
  }
  OpensslContext(const OpensslContext&) = delete;
  OpensslContext& operator=(const OpensslContext&) = delete;

  // kUsage or kUnavailable; to be called once, before anything else.
  Status open();

  const tls::Api& api() const { return *api_; }
  tls::Context* get() const { return context_; }
  const TlsFiles& files() const { return files_; }

 private:
  Status restrict_protocol();
  Status load_files();

  const std::shared_ptr<const tls::Api> api_;
  const TlsFiles files_;
  tls::Context* context_ = nullptr;
};

}  // namespace kvx
