// The part of OpenSSL's C interface that kvx uses, declared by kvx itself: there is no build or
// link dependency on OpenSSL. abi_check.cpp holds every value and signature here against the real
// openssl/ssl.h where the compiler finds one.
//
// Everything here is a function of both OpenSSL 1.1.1 and 3.x with the same signature. What their
// headers have as macros is spelled out as the control call that it stands for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvx::tls {

using Method = struct MethodTag;            // SSL_METHOD
using Context = struct ContextTag;          // SSL_CTX
using Session = struct SessionTag;          // SSL, one connection
using Bio = struct BioTag;                  // BIO
using Expectation = struct ExpectationTag;  // X509_VERIFY_PARAM
using InitSettings = struct InitSettingsTag;
using StoreContext = struct StoreContextTag;  // X509_STORE_CTX

using VerifyCallback = int (*)(int is_fine, StoreContext* store);
using PasswordCallback = int (*)(char* target, int bytes, int is_writing, void* user);

inline constexpr unsigned long kOldestVersion = 0x10101000UL;  // 1.1.1, the first with TLS 1.3
inline constexpr long kTls13 = 0x0304;
inline constexpr int kFilePem = 1;  // SSL_FILETYPE_PEM
inline constexpr int kVerifyPeer = 1;
inline constexpr int kVerifyFailIfNone = 2;
inline constexpr long kVerifyOk = 0;  // X509_V_OK
inline constexpr unsigned kNoPartialWildcards = 4;

// Commands of SSL_CTX_ctrl.
inline constexpr int kControlMode = 33;              // SSL_CTX_set_mode
inline constexpr int kControlSessionCacheMode = 44;  // SSL_CTX_set_session_cache_mode
inline constexpr int kControlMinProtoVersion = 123;  // SSL_CTX_set_min_proto_version
inline constexpr int kControlMaxProtoVersion = 124;  // SSL_CTX_set_max_proto_version
inline constexpr long kModePartialWrite = 1;         // SSL_MODE_ENABLE_PARTIAL_WRITE
inline constexpr long kModeMovingWriteBuffer = 2;    // SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
inline constexpr long kSessionCacheOff = 0;

// SSL_get_error
inline constexpr int kErrorSsl = 1;
inline constexpr int kErrorWantRead = 2;
inline constexpr int kErrorWantWrite = 3;
inline constexpr int kErrorSyscall = 5;
inline constexpr int kErrorZeroReturn = 6;

// X509_verify_cert_error_string has the text of these; kvx adds what to do.
inline constexpr long kVerifyNotYetValid = 9;
inline constexpr long kVerifyExpired = 10;
inline constexpr long kVerifySelfSigned = 18;
inline constexpr long kVerifySelfSignedInChain = 19;
inline constexpr long kVerifyNoIssuer = 20;
inline constexpr long kVerifyNoFirst = 21;
inline constexpr long kVerifyPurpose = 26;
inline constexpr long kVerifyHostMismatch = 62;
inline constexpr long kVerifyAddressMismatch = 64;

// Every entry point: name in Api, symbol, what it returns, parameters.
#define KVX_TLS_REQUIRED(ENTRY)                                                                  \
  ENTRY(version_number, OpenSSL_version_num, unsigned long, ())                                  \
  ENTRY(init, OPENSSL_init_ssl, int, (uint64_t options, const InitSettings* settings))           \
  ENTRY(error_next, ERR_get_error, unsigned long, ())                                            \
  ENTRY(error_clear, ERR_clear_error, void, ())                                                  \
  ENTRY(error_reason, ERR_reason_error_string, const char*, (unsigned long error))               \
  ENTRY(error_text, ERR_error_string_n, void, (unsigned long error, char* target, size_t bytes)) \
  ENTRY(verify_text, X509_verify_cert_error_string, const char*, (long result))                  \
  ENTRY(method, TLS_method, const Method*, ())                                                   \
  ENTRY(context_new, SSL_CTX_new, Context*, (const Method* method))                              \
  ENTRY(context_free, SSL_CTX_free, void, (Context * context))                                   \
  ENTRY(context_control, SSL_CTX_ctrl, long,                                                     \
        (Context * context, int command, long number, void* pointer))                            \
  ENTRY(context_set_tickets, SSL_CTX_set_num_tickets, int, (Context * context, size_t count))    \
  ENTRY(context_set_password, SSL_CTX_set_default_passwd_cb, void,                               \
        (Context * context, PasswordCallback callback))                                          \
  ENTRY(context_use_chain, SSL_CTX_use_certificate_chain_file, int,                              \
        (Context * context, const char* file))                                                   \
  ENTRY(context_use_key, SSL_CTX_use_PrivateKey_file, int,                                       \
        (Context * context, const char* file, int type))                                         \
  ENTRY(context_check_key, SSL_CTX_check_private_key, int, (const Context* context))             \
  ENTRY(context_load_authority, SSL_CTX_load_verify_locations, int,                              \
        (Context * context, const char* file, const char* directory))                            \
  ENTRY(context_set_verify, SSL_CTX_set_verify, void,                                            \
        (Context * context, int mode, VerifyCallback callback))                                  \
  ENTRY(session_new, SSL_new, Session*, (Context * context))                                     \
  ENTRY(session_free, SSL_free, void, (Session * session))                                       \
  ENTRY(session_set_bio, SSL_set_bio, void, (Session * session, Bio * reading, Bio * writing))   \
  ENTRY(session_accept, SSL_set_accept_state, void, (Session * session))                         \
  ENTRY(session_connect, SSL_set_connect_state, void, (Session * session))                       \
  ENTRY(session_expectation, SSL_get0_param, Expectation*, (Session * session))                  \
  ENTRY(session_read, SSL_read, int, (Session * session, void* target, int bytes))               \
  ENTRY(session_peek, SSL_peek, int, (Session * session, void* target, int bytes))               \
  ENTRY(session_write, SSL_write, int, (Session * session, const void* source, int bytes))       \
  ENTRY(session_error, SSL_get_error, int, (const Session* session, int result))                 \
  ENTRY(session_pending, SSL_pending, int, (const Session* session))                             \
  ENTRY(session_is_made, SSL_is_init_finished, int, (const Session* session))                    \
  ENTRY(session_verify_result, SSL_get_verify_result, long, (const Session* session))            \
  ENTRY(session_shutdown, SSL_shutdown, int, (Session * session))                                \
  ENTRY(expect_host, X509_VERIFY_PARAM_set1_host, int,                                           \
        (Expectation * expectation, const char* name, size_t bytes))                             \
  ENTRY(expect_address, X509_VERIFY_PARAM_set1_ip_asc, int,                                      \
        (Expectation * expectation, const char* address))                                        \
  ENTRY(expect_flags, X509_VERIFY_PARAM_set_hostflags, void,                                     \
        (Expectation * expectation, unsigned flags))                                             \
  ENTRY(bio_pair, BIO_new_bio_pair, int,                                                         \
        (Bio * *one, size_t one_bytes, Bio** other, size_t other_bytes))                         \
  ENTRY(bio_free, BIO_free, int, (Bio * bio))                                                    \
  ENTRY(bio_pending, BIO_ctrl_pending, size_t, (Bio * bio))                                      \
  ENTRY(bio_room, BIO_ctrl_get_write_guarantee, size_t, (Bio * bio))                             \
  ENTRY(bio_look, BIO_nread0, int, (Bio * bio, char** bytes))                                    \
  ENTRY(bio_take, BIO_nread, int, (Bio * bio, char** bytes, int count))                          \
  ENTRY(bio_offer, BIO_nwrite0, int, (Bio * bio, char** bytes))                                  \
  ENTRY(bio_put, BIO_nwrite, int, (Bio * bio, char** bytes, int count))

struct Api {
#define KVX_TLS_MEMBER(member, symbol, result, parameters) result(*member) parameters = nullptr;
  KVX_TLS_REQUIRED(KVX_TLS_MEMBER)
#undef KVX_TLS_MEMBER
};

}  // namespace kvx::tls
