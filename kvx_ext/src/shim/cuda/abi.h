// The part of the CUDA driver's C interface that kvx uses, declared by kvx itself: there is no
// build or link dependency on CUDA. abi_check.cpp holds every value, size and signature here
// against the real cuda.h where the compiler finds one. The simulated driver of the tests is
// written against the same file.
//
// Source: CUDA driver API 12.8 (cuda.h); 13.x keeps these entry points under version 12080.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvx::cuda {

using Result = int;                        // CUresult
using DeviceOrdinal = int;                 // CUdevice
using DevicePointer = unsigned long long;  // CUdeviceptr
using Context = struct ContextTag*;
using Stream = struct StreamTag*;  // null is the legacy default stream, which kvx never uses
using Event = struct EventTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using AllocationHandle = unsigned long long;  // CUmemGenericAllocationHandle

// The version of the interface that entry points are asked for.
inline constexpr int kAbiVersion = 12080;

inline constexpr Result kSuccess = 0;
inline constexpr Result kErrorInvalidValue = 1;
inline constexpr Result kErrorOutOfMemory = 2;
inline constexpr Result kErrorNotInitialized = 3;
inline constexpr Result kErrorDeinitialized = 4;
inline constexpr Result kErrorStubLibrary = 34;
inline constexpr Result kErrorNoDevice = 100;
inline constexpr Result kErrorInvalidDevice = 101;
inline constexpr Result kErrorInvalidContext = 201;
inline constexpr Result kErrorNoBinaryForGpu = 209;
inline constexpr Result kErrorEccUncorrectable = 214;
inline constexpr Result kErrorPeerAccessUnsupported = 217;
inline constexpr Result kErrorNvlinkUncorrectable = 220;
inline constexpr Result kErrorInvalidHandle = 400;
inline constexpr Result kErrorNotFound = 500;
inline constexpr Result kErrorNotReady = 600;
inline constexpr Result kErrorIllegalAddress = 700;
inline constexpr Result kErrorLaunchTimeout = 702;
inline constexpr Result kErrorPeerAccessAlreadyEnabled = 704;
inline constexpr Result kErrorContextIsDestroyed = 709;
inline constexpr Result kErrorAssert = 710;
inline constexpr Result kErrorHostMemoryAlreadyRegistered = 712;
inline constexpr Result kErrorHostMemoryNotRegistered = 713;
inline constexpr Result kErrorHardwareStack = 714;
inline constexpr Result kErrorIllegalInstruction = 715;
inline constexpr Result kErrorMisalignedAddress = 716;
inline constexpr Result kErrorInvalidAddressSpace = 717;
inline constexpr Result kErrorInvalidPc = 718;
inline constexpr Result kErrorLaunchFailed = 719;
inline constexpr Result kErrorNotPermitted = 800;
inline constexpr Result kErrorNotSupported = 801;
inline constexpr Result kErrorUnknown = 999;

// CUdevice_attribute
inline constexpr int kAttributeMultiprocessorCount = 16;
inline constexpr int kAttributeIntegrated = 18;
inline constexpr int kAttributePciBusId = 33;
inline constexpr int kAttributePciDeviceId = 34;
inline constexpr int kAttributeAsyncEngineCount = 40;
inline constexpr int kAttributeUnifiedAddressing = 41;
inline constexpr int kAttributePciDomainId = 50;
inline constexpr int kAttributeComputeCapabilityMajor = 75;
inline constexpr int kAttributeComputeCapabilityMinor = 76;
inline constexpr int kAttributeCanUseHostPointerForRegisteredMem = 91;
inline constexpr int kAttributeVirtualMemoryManagement = 102;
inline constexpr int kAttributePosixFileDescriptorHandles = 103;
inline constexpr int kAttributeHostNumaId = 134;

// CUpointer_attribute
inline constexpr int kPointerMemoryType = 2;         // int: kMemoryType*
inline constexpr int kPointerDeviceOrdinal = 9;      // int
inline constexpr int kPointerRangeStart = 11;        // DevicePointer
inline constexpr int kPointerRangeSize = 12;         // size_t
inline constexpr int kPointerLegacyIpcCapable = 10;  // int

// CUmemorytype
inline constexpr int kMemoryTypeHost = 1;
inline constexpr int kMemoryTypeDevice = 2;
inline constexpr int kMemoryTypeUnified = 4;

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kEventInterprocess = 4;
inline constexpr unsigned kWaitValueGeq = 0;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr unsigned kIpcLazyEnablePeerAccess = 1;

// CUmemcpySrcAccessOrder
inline constexpr int kSourceOrderStream = 1;
inline constexpr int kSourceOrderDuringCall = 2;
inline constexpr int kSourceOrderAny = 3;

inline constexpr unsigned kMemcpyDefault = 0;
inline constexpr unsigned kMemcpyPreferOverlapWithCompute = 1;

inline constexpr int kLocationDevice = 1;             // CU_MEM_LOCATION_TYPE_DEVICE
inline constexpr int kAllocationPinned = 1;           // CU_MEM_ALLOCATION_TYPE_PINNED
inline constexpr int kHandlePosixFileDescriptor = 1;  // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
inline constexpr int kAccessReadWrite = 3;            // CU_MEM_ACCESS_FLAGS_PROT_READWRITE
inline constexpr int kGranularityMinimum = 0;

struct MemLocation {
  int type = 0;
  int id = 0;
};

struct MemcpyAttributes {
  int source_access_order = 0;
  MemLocation source_hint;
  MemLocation target_hint;
  unsigned flags = 0;
};

struct Memcpy2D {
  size_t source_x_bytes = 0;
  size_t source_y = 0;
  int source_type = 0;
  const void* source_host = nullptr;
  DevicePointer source_device = 0;
  void* source_array = nullptr;
  size_t source_pitch = 0;
  size_t target_x_bytes = 0;
  size_t target_y = 0;
  int target_type = 0;
  void* target_host = nullptr;
  DevicePointer target_device = 0;
  void* target_array = nullptr;
  size_t target_pitch = 0;
  size_t width_bytes = 0;
  size_t height = 0;
};

struct AllocationProperties {
  int type = 0;
  int handle_types = 0;
  MemLocation location;
  void* win32_metadata = nullptr;
  struct {
    unsigned char compression = 0;
    unsigned char gpu_direct_rdma_capable = 0;
    unsigned short usage = 0;
    unsigned char reserved[4] = {};
  } flags;
};

struct AccessDescriptor {
  MemLocation location;
  int flags = 0;
};

struct Uuid {
  char bytes[16] = {};
};

struct IpcMemHandle {
  char reserved[64] = {};
};

struct IpcEventHandle {
  char reserved[64] = {};
};

// Every entry point: name in Api, symbol as cuGetProcAddress wants it, parameters. All return
// Result. The optional ones may be absent from an older driver; Api holds null for them.
#define KVX_CUDA_REQUIRED(ENTRY)                                                                   \
  ENTRY(init, cuInit, (unsigned flags))                                                            \
  ENTRY(driver_version, cuDriverGetVersion, (int* version))                                        \
  ENTRY(error_name, cuGetErrorName, (Result error, const char** name))                             \
  ENTRY(error_string, cuGetErrorString, (Result error, const char** text))                         \
  ENTRY(device_get, cuDeviceGet, (DeviceOrdinal * device, int ordinal))                            \
  ENTRY(device_count, cuDeviceGetCount, (int* count))                                              \
  ENTRY(device_name, cuDeviceGetName, (char* name, int bytes, DeviceOrdinal device))               \
  ENTRY(device_uuid, cuDeviceGetUuid, (Uuid * uuid, DeviceOrdinal device))                         \
  ENTRY(device_total_mem, cuDeviceTotalMem, (size_t* bytes, DeviceOrdinal device))                 \
  ENTRY(device_attribute, cuDeviceGetAttribute, (int* value, int attribute, DeviceOrdinal device)) \
  ENTRY(device_pci_bus_id, cuDeviceGetPCIBusId, (char* text, int bytes, DeviceOrdinal device))     \
  ENTRY(device_can_access_peer, cuDeviceCanAccessPeer,                                             \
        (int* can_access, DeviceOrdinal device, DeviceOrdinal peer))                               \
  ENTRY(primary_context_retain, cuDevicePrimaryCtxRetain,                                          \
        (Context * context, DeviceOrdinal device))                                                 \
  ENTRY(primary_context_release, cuDevicePrimaryCtxRelease, (DeviceOrdinal device))                \
  ENTRY(context_set_current, cuCtxSetCurrent, (Context context))                                   \
  ENTRY(context_get_current, cuCtxGetCurrent, (Context * context))                                 \
  ENTRY(context_push, cuCtxPushCurrent, (Context context))                                         \
  ENTRY(context_pop, cuCtxPopCurrent, (Context * context))                                         \
  ENTRY(context_stream_priorities, cuCtxGetStreamPriorityRange, (int* least, int* greatest))       \
  ENTRY(context_enable_peer, cuCtxEnablePeerAccess, (Context peer, unsigned flags))                \
  ENTRY(stream_create, cuStreamCreateWithPriority,                                                 \
        (Stream * stream, unsigned flags, int priority))                                           \
  ENTRY(stream_destroy, cuStreamDestroy, (Stream stream))                                          \
  ENTRY(stream_synchronize, cuStreamSynchronize, (Stream stream))                                  \
  ENTRY(stream_query, cuStreamQuery, (Stream stream))                                              \
  ENTRY(stream_wait_event, cuStreamWaitEvent, (Stream stream, Event event, unsigned flags))        \
  ENTRY(event_create, cuEventCreate, (Event * event, unsigned flags))                              \
  ENTRY(event_destroy, cuEventDestroy, (Event event))                                              \
  ENTRY(event_record, cuEventRecord, (Event event, Stream stream))                                 \
  ENTRY(event_query, cuEventQuery, (Event event))                                                  \
  ENTRY(event_synchronize, cuEventSynchronize, (Event event))                                      \
  ENTRY(event_elapsed, cuEventElapsedTime, (float* milliseconds, Event start, Event end))          \
  ENTRY(mem_alloc, cuMemAlloc, (DevicePointer * pointer, size_t bytes))                            \
  ENTRY(mem_free, cuMemFree, (DevicePointer pointer))                                              \
  ENTRY(mem_info, cuMemGetInfo, (size_t* free_bytes, size_t* total_bytes))                         \
  ENTRY(mem_address_range, cuMemGetAddressRange,                                                   \
        (DevicePointer * base, size_t* bytes, DevicePointer pointer))                              \
  ENTRY(host_register, cuMemHostRegister, (void* address, size_t bytes, unsigned flags))           \
  ENTRY(host_unregister, cuMemHostUnregister, (void* address))                                     \
  ENTRY(host_device_pointer, cuMemHostGetDevicePointer,                                            \
        (DevicePointer * pointer, void* address, unsigned flags))                                  \
  ENTRY(pointer_attribute, cuPointerGetAttribute,                                                  \
        (void* value, int attribute, DevicePointer pointer))                                       \
  ENTRY(memcpy_async, cuMemcpyAsync,                                                               \
        (DevicePointer target, DevicePointer source, size_t bytes, Stream stream))                 \
  ENTRY(memcpy_2d_async, cuMemcpy2DAsync, (const Memcpy2D* copy, Stream stream))                   \
  ENTRY(memcpy_peer_async, cuMemcpyPeerAsync,                                                      \
        (DevicePointer target, Context target_context, DevicePointer source,                       \
         Context source_context, size_t bytes, Stream stream))                                     \
  ENTRY(memset_async, cuMemsetD8Async,                                                             \
        (DevicePointer target, unsigned char value, size_t bytes, Stream stream))                  \
  ENTRY(address_reserve, cuMemAddressReserve,                                                      \
        (DevicePointer * pointer, size_t bytes, size_t alignment, DevicePointer hint,              \
         unsigned long long flags))                                                                \
  ENTRY(address_free, cuMemAddressFree, (DevicePointer pointer, size_t bytes))                     \
  ENTRY(mem_create, cuMemCreate,                                                                   \
        (AllocationHandle * handle, size_t bytes, const AllocationProperties* properties,          \
         unsigned long long flags))                                                                \
  ENTRY(mem_release, cuMemRelease, (AllocationHandle handle))                                      \
  ENTRY(mem_map, cuMemMap,                                                                         \
        (DevicePointer pointer, size_t bytes, size_t offset, AllocationHandle handle,              \
         unsigned long long flags))                                                                \
  ENTRY(mem_unmap, cuMemUnmap, (DevicePointer pointer, size_t bytes))                              \
  ENTRY(mem_set_access, cuMemSetAccess,                                                            \
        (DevicePointer pointer, size_t bytes, const AccessDescriptor* access, size_t count))       \
  ENTRY(mem_retain, cuMemRetainAllocationHandle, (AllocationHandle * handle, void* address))       \
  ENTRY(mem_export, cuMemExportToShareableHandle,                                                  \
        (void* shareable, AllocationHandle handle, int handle_type, unsigned long long flags))     \
  ENTRY(mem_import, cuMemImportFromShareableHandle,                                                \
        (AllocationHandle * handle, void* shareable, int handle_type))                             \
  ENTRY(mem_granularity, cuMemGetAllocationGranularity,                                            \
        (size_t* bytes, const AllocationProperties* properties, int option))                       \
  ENTRY(ipc_get_mem, cuIpcGetMemHandle, (IpcMemHandle * handle, DevicePointer pointer))            \
  ENTRY(ipc_open_mem, cuIpcOpenMemHandle,                                                          \
        (DevicePointer * pointer, IpcMemHandle handle, unsigned flags))                            \
  ENTRY(ipc_close_mem, cuIpcCloseMemHandle, (DevicePointer pointer))                               \
  ENTRY(ipc_get_event, cuIpcGetEventHandle, (IpcEventHandle * handle, Event event))                \
  ENTRY(ipc_open_event, cuIpcOpenEventHandle, (Event * event, IpcEventHandle handle))              \
  ENTRY(module_load, cuModuleLoadData, (Module * module, const void* image))                       \
  ENTRY(module_unload, cuModuleUnload, (Module module))                                            \
  ENTRY(module_function, cuModuleGetFunction,                                                      \
        (Function * function, Module module, const char* name))                                    \
  ENTRY(launch_kernel, cuLaunchKernel,                                                             \
        (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
         unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream,                 \
         void** parameters, void** extra))

#define KVX_CUDA_OPTIONAL(ENTRY)                                                         \
  ENTRY(stream_wait_value, cuStreamWaitValue32,                                          \
        (Stream stream, DevicePointer address, uint32_t value, unsigned flags))          \
  ENTRY(stream_write_value, cuStreamWriteValue32,                                        \
        (Stream stream, DevicePointer address, uint32_t value, unsigned flags))          \
  ENTRY(memcpy_batch_async, cuMemcpyBatchAsync,                                          \
        (DevicePointer * targets, DevicePointer * sources, size_t* bytes, size_t count,  \
         MemcpyAttributes* attributes, size_t* attribute_starts, size_t attribute_count, \
         size_t* failed_index, Stream stream))

struct Api {
#define KVX_CUDA_MEMBER(member, symbol, parameters) Result(*member) parameters = nullptr;
  KVX_CUDA_REQUIRED(KVX_CUDA_MEMBER)
  KVX_CUDA_OPTIONAL(KVX_CUDA_MEMBER)
#undef KVX_CUDA_MEMBER
};

// Exported by the library under this name; everything else is asked for through it.
inline constexpr const char* kGetProcAddressSymbol = "cuGetProcAddress_v2";
using GetProcAddress = Result (*)(const char* symbol, void** function, int version, uint64_t flags,
                                  int* symbol_status);

}  // namespace kvx::cuda
