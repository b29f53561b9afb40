// What a kernel needs of the machine below it. Compiled by nvcc or NVRTC it is CUDA; compiled as
// plain C++ every access goes through `resolve`, which whoever includes the kernels defines with a
// check of its bounds (tests/sim/cuda/kernels.cpp).
//
// Kernels touch global memory through `load` and `store` only, and use neither barriers, shared
// memory, atomics nor warp instructions: threads may run one after the other in any order.
#pragma once

namespace kvx::kernel {

// NVRTC has no <cstdint>. All three compilers agree on these sizes on every platform of CUDA.
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
static_assert(sizeof(uint16_t) == 2 && sizeof(uint32_t) == 4 && sizeof(uint64_t) == 8);

// The widest thing that one instruction loads.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

// Threads of a block of every launch: three or four blocks have some 100 KB of loads in flight,
// more than a link to the host can hold.
inline constexpr int kBlockThreads = 512;

#ifdef __CUDACC__

// Bounded, so that no compiler takes more registers than a launch of kBlockThreads has.
#define KVX_KERNEL extern "C" __global__ __launch_bounds__(kBlockThreads)
#define KVX_DEVICE __device__ __forceinline__
#define KVX_CALLED __device__ __noinline__
// A struct passed by value stays in constant memory even where it is indexed at run time.
#define KVX_PARAMETER const __grid_constant__
#define KVX_UNROLL _Pragma("unroll")
// For loops off the hot path: the compiler unrolls them all unless it is told.
#define KVX_ROLLED _Pragma("unroll 1")

template <typename T>
KVX_DEVICE T load(uint64_t address) {
  return *reinterpret_cast<const T*>(address);
}

template <typename T>
KVX_DEVICE void store(uint64_t address, T value) {
  *reinterpret_cast<T*>(address) = value;
}

KVX_DEVICE uint64_t thread_index() {
  const uint64_t block = (uint64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return block * (blockDim.x * blockDim.y * blockDim.z) + thread;
}

KVX_DEVICE uint64_t thread_count() {
  return uint64_t{gridDim.x} * gridDim.y * gridDim.z * (blockDim.x * blockDim.y * blockDim.z);
}

KVX_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
KVX_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

#else

#define KVX_KERNEL extern "C"
#define KVX_DEVICE inline
#define KVX_CALLED inline
#define KVX_PARAMETER const
#define KVX_UNROLL
#define KVX_ROLLED

// Returns where `bytes` at the device's `address` lie on the host, or does not return.
void* resolve(uint64_t address, uint64_t bytes, bool is_write);
uint64_t thread_index();
uint64_t thread_count();

template <typename T>
T load(uint64_t address) {
  T value;
  __builtin_memcpy(&value, resolve(address, sizeof(T), false), sizeof(T));
  return value;
}

template <typename T>
void store(uint64_t address, T value) {
  __builtin_memcpy(resolve(address, sizeof(T), true), &value, sizeof(T));
}

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

#endif

}  // namespace kvx::kernel
