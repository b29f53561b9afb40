// Holds kvx's own declarations against the real cuda.h. Empty where there is none: nothing of CUDA
// is needed to build kvx.
#if __has_include(<cuda.h>)

#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "shim/cuda/abi.h"

namespace kvx::cuda {

namespace {

// Two types are alike when a call passes them the same way: the same size, and both or neither a
// pointer, an integer (or enum) or a struct.
template <typename Ours, typename Theirs>
constexpr bool kAlike =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
    (std::is_integral_v<Ours> || std::is_enum_v<Ours>) ==
        (std::is_integral_v<Theirs> || std::is_enum_v<Theirs>) &&
    std::is_class_v<Ours> == std::is_class_v<Theirs>;

template <typename Ours, typename Theirs>
constexpr bool kSameSignature = false;
template <typename... Ours, typename... Theirs>
constexpr bool kSameSignature<Result (*)(Ours...), CUresult (*)(Theirs...)> = [] {
  if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
    return (kAlike<Ours, Theirs> && ...);
  } else {
    return false;
  }
}();

// cuda.h renames most symbols to their newest version by macro; `symbol` follows it, so each check
// is of the version that cuGetProcAddress hands out. The batch copy is the exception: kvx takes its
// 12.8 form, cuda.h of 13 declares the newer one (see cudaTypedefs.h, v12080).
#define KVX_CUDA_CHECK(member, symbol, parameters)                        \
  static_assert(kSameSignature<decltype(Api::member), decltype(&symbol)>, \
                "the declaration of " #symbol " differs from cuda.h");
KVX_CUDA_REQUIRED(KVX_CUDA_CHECK)
#undef KVX_CUDA_CHECK
static_assert(kSameSignature<decltype(Api::stream_wait_value), decltype(&cuStreamWaitValue32)>);
static_assert(kSameSignature<decltype(Api::stream_write_value), decltype(&cuStreamWriteValue32)>);
#if CUDA_VERSION < 13000 && CUDA_VERSION >= 12080
static_assert(kSameSignature<decltype(Api::memcpy_batch_async), decltype(&cuMemcpyBatchAsync)>);
#endif

#define KVX_CUDA_SAME(ours, theirs) static_assert(static_cast<long long>(ours) == (theirs))
KVX_CUDA_SAME(kSuccess, CUDA_SUCCESS);
KVX_CUDA_SAME(kErrorInvalidValue, CUDA_ERROR_INVALID_VALUE);
KVX_CUDA_SAME(kErrorOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
KVX_CUDA_SAME(kErrorNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
KVX_CUDA_SAME(kErrorDeinitialized, CUDA_ERROR_DEINITIALIZED);
KVX_CUDA_SAME(kErrorStubLibrary, CUDA_ERROR_STUB_LIBRARY);
KVX_CUDA_SAME(kErrorNoDevice, CUDA_ERROR_NO_DEVICE);
KVX_CUDA_SAME(kErrorInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
KVX_CUDA_SAME(kErrorInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
KVX_CUDA_SAME(kErrorNoBinaryForGpu, CUDA_ERROR_NO_BINARY_FOR_GPU);
KVX_CUDA_SAME(kErrorEccUncorrectable, CUDA_ERROR_ECC_UNCORRECTABLE);
KVX_CUDA_SAME(kErrorPeerAccessUnsupported, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
KVX_CUDA_SAME(kErrorNvlinkUncorrectable, CUDA_ERROR_NVLINK_UNCORRECTABLE);
KVX_CUDA_SAME(kErrorInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
KVX_CUDA_SAME(kErrorNotFound, CUDA_ERROR_NOT_FOUND);
KVX_CUDA_SAME(kErrorNotReady, CUDA_ERROR_NOT_READY);
KVX_CUDA_SAME(kErrorIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
KVX_CUDA_SAME(kErrorLaunchTimeout, CUDA_ERROR_LAUNCH_TIMEOUT);
KVX_CUDA_SAME(kErrorPeerAccessAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
KVX_CUDA_SAME(kErrorContextIsDestroyed, CUDA_ERROR_CONTEXT_IS_DESTROYED);
KVX_CUDA_SAME(kErrorAssert, CUDA_ERROR_ASSERT);
KVX_CUDA_SAME(kErrorHostMemoryAlreadyRegistered, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
KVX_CUDA_SAME(kErrorHostMemoryNotRegistered, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
KVX_CUDA_SAME(kErrorHardwareStack, CUDA_ERROR_HARDWARE_STACK_ERROR);
KVX_CUDA_SAME(kErrorIllegalInstruction, CUDA_ERROR_ILLEGAL_INSTRUCTION);
KVX_CUDA_SAME(kErrorMisalignedAddress, CUDA_ERROR_MISALIGNED_ADDRESS);
KVX_CUDA_SAME(kErrorInvalidAddressSpace, CUDA_ERROR_INVALID_ADDRESS_SPACE);
KVX_CUDA_SAME(kErrorInvalidPc, CUDA_ERROR_INVALID_PC);
KVX_CUDA_SAME(kErrorLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
KVX_CUDA_SAME(kErrorNotPermitted, CUDA_ERROR_NOT_PERMITTED);
KVX_CUDA_SAME(kErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED);
KVX_CUDA_SAME(kErrorUnknown, CUDA_ERROR_UNKNOWN);
KVX_CUDA_SAME(kAttributeMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
KVX_CUDA_SAME(kAttributeIntegrated, CU_DEVICE_ATTRIBUTE_INTEGRATED);
KVX_CUDA_SAME(kAttributePciBusId, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID);
KVX_CUDA_SAME(kAttributePciDeviceId, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID);
KVX_CUDA_SAME(kAttributeAsyncEngineCount, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
KVX_CUDA_SAME(kAttributeUnifiedAddressing, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING);
KVX_CUDA_SAME(kAttributePciDomainId, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID);
KVX_CUDA_SAME(kAttributeComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
KVX_CUDA_SAME(kAttributeComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
KVX_CUDA_SAME(kAttributeCanUseHostPointerForRegisteredMem,
              CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
KVX_CUDA_SAME(kAttributeVirtualMemoryManagement,
              CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
KVX_CUDA_SAME(kAttributePosixFileDescriptorHandles,
              CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
KVX_CUDA_SAME(kAttributeHostNumaId, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID);
KVX_CUDA_SAME(kPointerMemoryType, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
KVX_CUDA_SAME(kPointerDeviceOrdinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
KVX_CUDA_SAME(kPointerRangeStart, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
KVX_CUDA_SAME(kPointerRangeSize, CU_POINTER_ATTRIBUTE_RANGE_SIZE);
KVX_CUDA_SAME(kPointerLegacyIpcCapable, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
KVX_CUDA_SAME(kMemoryTypeHost, CU_MEMORYTYPE_HOST);
KVX_CUDA_SAME(kMemoryTypeDevice, CU_MEMORYTYPE_DEVICE);
KVX_CUDA_SAME(kMemoryTypeUnified, CU_MEMORYTYPE_UNIFIED);
KVX_CUDA_SAME(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
KVX_CUDA_SAME(kEventBlockingSync, CU_EVENT_BLOCKING_SYNC);
KVX_CUDA_SAME(kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
KVX_CUDA_SAME(kEventInterprocess, CU_EVENT_INTERPROCESS);
KVX_CUDA_SAME(kWaitValueGeq, CU_STREAM_WAIT_VALUE_GEQ);
KVX_CUDA_SAME(kHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE);
KVX_CUDA_SAME(kIpcLazyEnablePeerAccess, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
KVX_CUDA_SAME(kLocationDevice, CU_MEM_LOCATION_TYPE_DEVICE);
KVX_CUDA_SAME(kAllocationPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
KVX_CUDA_SAME(kHandlePosixFileDescriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
KVX_CUDA_SAME(kAccessReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
KVX_CUDA_SAME(kGranularityMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
#if CUDA_VERSION >= 12080
KVX_CUDA_SAME(kSourceOrderStream, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
KVX_CUDA_SAME(kSourceOrderDuringCall, CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL);
KVX_CUDA_SAME(kSourceOrderAny, CU_MEMCPY_SRC_ACCESS_ORDER_ANY);
KVX_CUDA_SAME(kMemcpyDefault, CU_MEMCPY_FLAG_DEFAULT);
KVX_CUDA_SAME(kMemcpyPreferOverlapWithCompute, CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE);
static_assert(sizeof(MemcpyAttributes) == sizeof(CUmemcpyAttributes));
static_assert(offsetof(MemcpyAttributes, flags) == offsetof(CUmemcpyAttributes, flags));
#endif
#undef KVX_CUDA_SAME

static_assert(sizeof(MemLocation) == sizeof(CUmemLocation));
static_assert(sizeof(Memcpy2D) == sizeof(CUDA_MEMCPY2D));
static_assert(offsetof(Memcpy2D, source_device) == offsetof(CUDA_MEMCPY2D, srcDevice));
static_assert(offsetof(Memcpy2D, source_pitch) == offsetof(CUDA_MEMCPY2D, srcPitch));
static_assert(offsetof(Memcpy2D, target_device) == offsetof(CUDA_MEMCPY2D, dstDevice));
static_assert(offsetof(Memcpy2D, target_pitch) == offsetof(CUDA_MEMCPY2D, dstPitch));
static_assert(offsetof(Memcpy2D, width_bytes) == offsetof(CUDA_MEMCPY2D, WidthInBytes));
static_assert(offsetof(Memcpy2D, height) == offsetof(CUDA_MEMCPY2D, Height));
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(AllocationProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(sizeof(AccessDescriptor) == sizeof(CUmemAccessDesc));
static_assert(sizeof(Uuid) == sizeof(CUuuid));
static_assert(sizeof(IpcMemHandle) == sizeof(CUipcMemHandle));
static_assert(sizeof(IpcEventHandle) == sizeof(CUipcEventHandle));

}  // namespace

}  // namespace kvx::cuda

#endif
