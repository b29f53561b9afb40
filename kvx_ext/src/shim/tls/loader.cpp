#include "shim/tls/loader.h"

#include <dlfcn.h>

#include <cstdio>
#include <utility>

namespace kvx::tls {

namespace {

constexpr const char* kLibraries[] = {"libssl.so.3", "libssl.so.1.1"};
constexpr const char* kRemedy =
    "; install OpenSSL 3 (apt install libssl3, dnf install openssl-libs), or run without TLS";

// Symbols of libcrypto are found through libssl, which depends on it: never those of another one.
Status resolve_all(const std::string& library, void* handle, Api* api) {
#define KVX_TLS_RESOLVE(member, symbol, result, parameters)                           \
  api->member = reinterpret_cast<decltype(Api::member)>(dlsym(handle, #symbol));      \
  if (api->member == nullptr) {                                                       \
    return {Code::kUnavailable,                                                       \
            library + " has no " #symbol ": it is not OpenSSL 1.1.1 or 3" + kRemedy}; \
  }
  KVX_TLS_REQUIRED(KVX_TLS_RESOLVE)
#undef KVX_TLS_RESOLVE
  return Status::Ok();
}

std::string version_text(unsigned long version) {
  char text[32];
  std::snprintf(text, sizeof(text), "%lu.%lu.%lu", version >> 28, version >> 20 & 0xff,
                version >> 12 & 0xff);
  return text;
}

Status use(const std::string& library, void* handle, std::shared_ptr<const Api>* api) {
  auto made = std::make_shared<Api>();
  if (Status status = resolve_all(library, handle, made.get()); !status.ok()) return status;
  const unsigned long version = made->version_number();
  if (version < kOldestVersion) {
    return {Code::kUnavailable,
            library + " is OpenSSL " + version_text(version) + ", TLS 1.3 needs 1.1.1" + kRemedy};
  }
  if (made->init(0, nullptr) != 1) {
    return {Code::kUnavailable, library + " does not start: " + take_errors(*made) +
                                    "; check its openssl.cnf and OPENSSL_CONF"};
  }
  *api = std::move(made);
  return Status::Ok();
}

}  // namespace

Status load_library(std::shared_ptr<const Api>* api) {
  Status first;
  for (const char* library : kLibraries) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    Status status;
    if (handle != nullptr) {
      status = use(library, handle, api);
      if (status.ok()) return status;
    } else {
      const char* reason = dlerror();
      status = {
          Code::kUnavailable,
          "there is no libssl: " + std::string(reason == nullptr ? library : reason) + kRemedy};
    }
    // What is wrong with the newest is what is worth mending.
    if (first.ok()) first = std::move(status);
  }
  return first;
}

std::string take_errors(const Api& api) {
  std::string all;
  std::string last;
  for (unsigned long error = api.error_next(); error != 0; error = api.error_next()) {
    char text[256] = {};
    const char* reason = api.error_reason(error);
    if (reason == nullptr) api.error_text(error, text, sizeof(text));
    std::string one = reason != nullptr ? reason : text;
    if (one == last) continue;
    all += (all.empty() ? "" : ", ") + one;
    last = std::move(one);
  }
  return all;
}

}  // namespace kvx::tls
