// Memory and events of another process. A handle names a process and a file descriptor of it, which
// this one opens through /proc.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "copies.h"
#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

constexpr uint64_t kMemoryMagic = 0x6d65'6d6f'7279'6b76;
constexpr uint64_t kEventMagic = 0x6576'656e'7473'6b76;

struct Ticket {
  uint64_t magic = 0;
  int64_t process = 0;
  int64_t fd = 0;
  uint64_t bytes = 0;
};

template <typename Handle>
void write_ticket(Handle* handle, const Ticket& ticket) {
  static_assert(sizeof(Ticket) <= sizeof(Handle));
  *handle = Handle{};
  std::memcpy(handle->reserved, &ticket, sizeof ticket);
}

// Opens what the ticket names; a real driver refuses a handle of the same process.
template <typename Handle>
Result open_ticket(const Handle& handle, uint64_t magic, Ticket* ticket, int* fd) {
  std::memcpy(ticket, handle.reserved, sizeof *ticket);
  if (ticket->magic != magic) return kErrorInvalidValue;
  if (ticket->process == getpid()) return kErrorInvalidContext;
  const std::string path =
      "/proc/" + std::to_string(ticket->process) + "/fd/" + std::to_string(ticket->fd);
  *fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  return *fd < 0 ? kErrorInvalidValue : kSuccess;
}

// One memory, whoever opens it and how often.
uint64_t identity_of(int fd) {
  struct stat status{};
  return fstat(fd, &status) == 0 ? status.st_ino : 0;
}

Result map_imported(Call& call, int fd, size_t bytes, DevicePointer* pointer) {
  auto backing = std::make_shared<Backing>(fd, bytes, call.device(), false);
  const uint64_t identity = identity_of(fd);
  for (const auto& [address, memory] : call->memory.reservations()) {
    if (memory->kind != ReservationKind::kImported || memory->imported_from != identity) continue;
    ++memory->times_opened;
    *pointer = address;
    return kSuccess;
  }
  const auto memory =
      call->memory.reserve(bytes, kAllocationAlignment, call.device(), ReservationKind::kImported);
  if (memory == nullptr) return kErrorOutOfMemory;
  memory->imported_from = identity;
  memory->times_opened = 1;
  if (!memory->map(0, std::move(backing), ~0u)) {
    call->memory.remove(*memory);
    return kErrorOutOfMemory;
  }
  *pointer = memory->address;
  return kSuccess;
}

}  // namespace

extern "C" {

Result cuIpcGetMemHandle(IpcMemHandle* handle, DevicePointer pointer) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  const bool is_allocation =
      memory != nullptr && memory->kind == ReservationKind::kAllocated && handle != nullptr;
  if (!is_allocation) return kErrorInvalidValue;
  const Backing& backing = *memory->mappings.at(0).backing;
  write_ticket(handle, Ticket{kMemoryMagic, getpid(), backing.fd, backing.bytes});
  return kSuccess;
}

Result cuIpcOpenMemHandle(DevicePointer* pointer, IpcMemHandle handle, unsigned flags) {
  KVX_SIM_ENTER(call)
  if (pointer == nullptr || flags != kIpcLazyEnablePeerAccess) return kErrorInvalidValue;
  Ticket ticket;
  int fd = -1;
  const Result result = open_ticket(handle, kMemoryMagic, &ticket, &fd);
  return result != kSuccess ? result : map_imported(call, fd, ticket.bytes, pointer);
}

Result cuIpcCloseMemHandle(DevicePointer pointer) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  const bool is_imported =
      memory != nullptr && memory->address == pointer && memory->kind == ReservationKind::kImported;
  if (!is_imported) return kErrorInvalidValue;
  if (--memory->times_opened > 0) return kSuccess;
  quiesce(call, memory->address, memory->bytes);
  call->memory.remove(*memory);
  return kSuccess;
}

Result cuIpcGetEventHandle(IpcEventHandle* handle, Event event) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(event);
  if (found == nullptr) return kErrorInvalidHandle;
  if (found->shared == nullptr || handle == nullptr) return kErrorInvalidValue;
  write_ticket(handle, Ticket{kEventMagic, getpid(), found->shared->fd, 0});
  return kSuccess;
}

Result cuIpcOpenEventHandle(Event* event, IpcEventHandle handle) {
  KVX_SIM_ENTER(call)
  if (event == nullptr) return kErrorInvalidValue;
  Ticket ticket;
  int fd = -1;
  const Result result = open_ticket(handle, kEventMagic, &ticket, &fd);
  if (result != kSuccess) return result;
  auto shared = SharedEvent::create(fd);
  if (shared == nullptr) return kErrorOutOfMemory;
  const auto created =
      call->streams.create_event(call.device(), kEventInterprocess | kEventDisableTiming);
  created->shared = std::move(shared);
  *event = handle_of<Event>(event_number(created->id));
  return kSuccess;
}

Result cuMemRetainAllocationHandle(AllocationHandle* handle, void* address) {
  KVX_SIM_ENTER(call)
  const auto pointer = reinterpret_cast<uint64_t>(address);
  const auto memory = call->memory.find(pointer);
  if (memory == nullptr || memory->kind != ReservationKind::kVirtual || handle == nullptr) {
    return kErrorInvalidValue;
  }
  const auto mapping = memory->find(pointer - memory->address);
  if (mapping == memory->mappings.end()) return kErrorInvalidValue;
  *handle = call->memory.next_handle++;
  call->memory.handles[*handle] = mapping->second.backing;
  return kSuccess;
}

Result cuMemExportToShareableHandle(void* shareable, AllocationHandle handle, int handle_type,
                                    unsigned long long flags) {
  KVX_SIM_ENTER(call)
  const auto found = call->memory.handles.find(handle);
  const bool is_sound = found != call->memory.handles.end() && shareable != nullptr &&
                        handle_type == kHandlePosixFileDescriptor && flags == 0;
  if (!is_sound || !found->second->is_exportable) return kErrorInvalidValue;
  const int fd = fcntl(found->second->fd, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return kErrorOutOfMemory;
  *static_cast<int*>(shareable) = fd;
  return kSuccess;
}

Result cuMemImportFromShareableHandle(AllocationHandle* handle, void* shareable, int handle_type) {
  KVX_SIM_ENTER(call)
  if (handle == nullptr || handle_type != kHandlePosixFileDescriptor) return kErrorInvalidValue;
  // The descriptor itself travels as the pointer; it stays the caller's.
  const int theirs = static_cast<int>(reinterpret_cast<intptr_t>(shareable));
  struct stat status{};
  if (fstat(theirs, &status) != 0 || status.st_size == 0) return kErrorInvalidValue;
  const int fd = fcntl(theirs, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return kErrorOutOfMemory;
  const auto bytes = static_cast<size_t>(status.st_size);
  *handle = call->memory.next_handle++;
  call->memory.handles[*handle] = std::make_shared<Backing>(fd, bytes, call.device(), false);
  return kSuccess;
}

}  // extern "C"

KVX_SIM_ALIAS(cuIpcOpenMemHandle_v2, cuIpcOpenMemHandle)

}  // namespace kvx::sim
