// How a test steers the simulated driver and asks what happened. Exported with C linkage, so that
// Python reaches it through ctypes and a native test through dlsym. All are thread-safe, but
// kvxsim_reset, which nobody may race with. None needs a context.
#pragma once

#include <cstddef>
#include <cstdint>

#define KVXSIM_API extern "C" [[gnu::visibility("default")]]

// The engines of every device: host to device, device to host, and all else (kernels too).
enum KvxsimEngine { kKvxsimHostToDevice = 0, kKvxsimDeviceToHost = 1, kKvxsimOnDevice = 2 };

// Ends all streams (what is queued is dropped), frees all memory, forgets registrations, events,
// contexts, injected failures, counts and convictions, and restores every setting. Handles from
// before are refused afterwards.
KVXSIM_API void kvxsim_reset();

// Settings, for all devices alike. At most 8 devices; 0 makes cuInit fail with "no device".
KVXSIM_API void kvxsim_set_devices(int count);
KVXSIM_API void kvxsim_set_total_memory(size_t bytes);
// What cuDeviceGetAttribute answers.
KVXSIM_API void kvxsim_set_attribute(int attribute, int value);
// What cuDriverGetVersion answers; cuGetProcAddress_v2 has nothing that is newer.
KVXSIM_API void kvxsim_set_driver_version(int version);
// How long copies take: bytes / bandwidth (0: no time), plus the latency once an operation.
KVXSIM_API void kvxsim_set_bandwidth(int engine, uint64_t bytes_per_s);
KVXSIM_API void kvxsim_set_latency(int engine, uint64_t nanoseconds);
// What the order within batches is drawn from.
KVXSIM_API void kvxsim_set_shuffle_seed(uint64_t seed);
// 0 hides the entry points from cuGetProcAddress_v2, as an older driver would.
KVXSIM_API void kvxsim_set_has_batch_copy(int has);
KVXSIM_API void kvxsim_set_has_stream_values(int has);
// Whether devices can reach each other's memory, as cuDeviceCanAccessPeer answers.
KVXSIM_API void kvxsim_set_has_peer_access(int has);

// Fails the nth call from now on (1: the next) of an entry point, named as in abi.h. A sticky one
// loses the context: every later call on it fails alike until it was released.
KVXSIM_API void kvxsim_inject(const char* symbol, uint64_t nth, int result, int is_sticky);
// Makes every call of an entry point take that long before it does anything; 0 ends it.
KVXSIM_API void kvxsim_delay(const char* symbol, uint64_t microseconds);
// While frozen, copies of an engine start but do not end.
KVXSIM_API void kvxsim_freeze(int engine, int is_frozen);
// Loses a device's context as if a kernel had failed, with nobody calling; 0 brings it back.
KVXSIM_API void kvxsim_fail_context(int device, int result);

// What the caller of the driver did wrong. Kinds: "race", "free_in_flight", "null_stream",
// "illegal_address", "no_access", "kernel_out_of_bounds", "spans_registrations".
KVXSIM_API uint64_t kvxsim_convictions_count();
// Writes "kind: text", at most `bytes` of it with the final zero; returns the length that the whole
// has, or -1 when there are no so many.
KVXSIM_API int64_t kvxsim_conviction(uint64_t index, char* text, size_t bytes);
KVXSIM_API void kvxsim_clear_convictions();

// "launches", "copies" (parts of batches and rows too), "batch_calls", "pageable_copies",
// "bytes_h2d", "bytes_d2h", "bytes_d2d", "live_allocations", "live_registrations", "live_streams",
// "live_events", "tracked_accesses"; -1 for any other name.
KVXSIM_API int64_t kvxsim_count(const char* name);

// Device memory for tests, at once and without a stream; accesses of the host, so they must be
// ordered after the operations that touch the range. Return 0, or 1 for a wrong range.
KVXSIM_API int kvxsim_copy_to_device(uint64_t target, const void* source, size_t bytes);
KVXSIM_API int kvxsim_copy_from_device(void* target, uint64_t source, size_t bytes);
KVXSIM_API int kvxsim_memset(uint64_t target, int value, size_t bytes);

// Announces that the host is about to read or write memory that operations may touch; kvx calls it
// where it is there. At the very address of a word that streams write or wait for it orders
// instead: announce a read once the value is there, and the host knows what came before on the
// stream; a write before each store, and the stream that waits for it knows what the host knew by
// then (never announced: what the host knows when the stream sees the value, which can hide a
// race).
KVXSIM_API void kvxsim_host_access(const void* address, size_t bytes, int is_write);
