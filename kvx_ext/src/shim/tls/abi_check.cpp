// Holds kvx's own declarations against the real OpenSSL. Empty where its headers are missing:
// nothing of OpenSSL is needed to build kvx.
#if __has_include(<openssl/ssl.h>)

#include <openssl/bio.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>

#include <type_traits>

#include "shim/tls/abi.h"

// The headers of its descendants say nothing about the library that is loaded.
#if OPENSSL_VERSION_NUMBER >= 0x10101000L && !defined(LIBRESSL_VERSION_NUMBER) && \
    !defined(OPENSSL_IS_BORINGSSL)

namespace kvx::tls {

namespace {

// Two types are alike when a call passes them the same way: the same size, and both or neither a
// pointer or an integer.
template <typename Ours, typename Theirs>
constexpr bool kAlike =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
    std::is_integral_v<Ours> == std::is_integral_v<Theirs> &&
    std::is_signed_v<Ours> == std::is_signed_v<Theirs>;
template <>
constexpr bool kAlike<void, void> = true;

template <typename Ours, typename Theirs>
constexpr bool kSameSignature = false;
template <typename Result, typename... Ours, typename TheirResult, typename... Theirs>
constexpr bool kSameSignature<Result (*)(Ours...), TheirResult (*)(Theirs...)> = [] {
  if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
    return kAlike<Result, TheirResult> && (kAlike<Ours, Theirs> && ...);
  } else {
    return false;
  }
}();

#define KVX_TLS_CHECK(member, symbol, result, parameters)                 \
  static_assert(kSameSignature<decltype(Api::member), decltype(&symbol)>, \
                "the declaration of " #symbol " differs from OpenSSL's");
KVX_TLS_REQUIRED(KVX_TLS_CHECK)
#undef KVX_TLS_CHECK

#define KVX_TLS_SAME(ours, theirs) static_assert(static_cast<long long>(ours) == (theirs))
KVX_TLS_SAME(kTls13, TLS1_3_VERSION);
KVX_TLS_SAME(kFilePem, SSL_FILETYPE_PEM);
KVX_TLS_SAME(kVerifyPeer, SSL_VERIFY_PEER);
KVX_TLS_SAME(kVerifyFailIfNone, SSL_VERIFY_FAIL_IF_NO_PEER_CERT);
KVX_TLS_SAME(kVerifyOk, X509_V_OK);
KVX_TLS_SAME(kNoPartialWildcards, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
KVX_TLS_SAME(kControlMode, SSL_CTRL_MODE);
KVX_TLS_SAME(kControlSessionCacheMode, SSL_CTRL_SET_SESS_CACHE_MODE);
KVX_TLS_SAME(kControlMinProtoVersion, SSL_CTRL_SET_MIN_PROTO_VERSION);
KVX_TLS_SAME(kControlMaxProtoVersion, SSL_CTRL_SET_MAX_PROTO_VERSION);
KVX_TLS_SAME(kModePartialWrite, SSL_MODE_ENABLE_PARTIAL_WRITE);
KVX_TLS_SAME(kModeMovingWriteBuffer, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
KVX_TLS_SAME(kSessionCacheOff, SSL_SESS_CACHE_OFF);
KVX_TLS_SAME(kErrorSsl, SSL_ERROR_SSL);
KVX_TLS_SAME(kErrorWantRead, SSL_ERROR_WANT_READ);
KVX_TLS_SAME(kErrorWantWrite, SSL_ERROR_WANT_WRITE);
KVX_TLS_SAME(kErrorSyscall, SSL_ERROR_SYSCALL);
KVX_TLS_SAME(kErrorZeroReturn, SSL_ERROR_ZERO_RETURN);
KVX_TLS_SAME(kVerifyNotYetValid, X509_V_ERR_CERT_NOT_YET_VALID);
KVX_TLS_SAME(kVerifyExpired, X509_V_ERR_CERT_HAS_EXPIRED);
KVX_TLS_SAME(kVerifySelfSigned, X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT);
KVX_TLS_SAME(kVerifySelfSignedInChain, X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN);
KVX_TLS_SAME(kVerifyNoIssuer, X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY);
KVX_TLS_SAME(kVerifyNoFirst, X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE);
KVX_TLS_SAME(kVerifyPurpose, X509_V_ERR_INVALID_PURPOSE);
KVX_TLS_SAME(kVerifyHostMismatch, X509_V_ERR_HOSTNAME_MISMATCH);
KVX_TLS_SAME(kVerifyAddressMismatch, X509_V_ERR_IP_ADDRESS_MISMATCH);
#undef KVX_TLS_SAME

}  // namespace

}  // namespace kvx::tls

#endif
#endif
