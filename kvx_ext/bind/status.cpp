#include "bind.h"

namespace nb = nanobind;

namespace kvx::bind {

namespace {

const char* exception_name(Code code) {
  switch (code) {
    case Code::kUsage:
      return "UsageError";
    case Code::kCapacity:
      return "CapacityError";
    case Code::kUnavailable:
      return "UnavailableError";
    case Code::kStorage:
      return "StorageError";
    case Code::kShort:
      return "StorageError";
    case Code::kCorrupt:
      return "CorruptBlock";
    case Code::kStale:
      return "StaleReference";
    case Code::kTimeout:
      return "TransferTimeout";
    case Code::kCancelled:
      return "TransferCancelled";
    case Code::kPeerLost:
      return "PeerLost";
    case Code::kDevice:
    case Code::kSkipped:
      return "TransferError";
    case Code::kOk:
      break;
  }
  return "KvxError";
}

}  // namespace

void raise_if_error(const Status& status) {
  if (status.ok()) return;
  nb::object type = nb::module_::import_("kvx.errors").attr(exception_name(status.code()));
  nb::object error = type(nb::str(status.message().c_str()));
  if (status.error_number() != 0) error.attr("errno") = status.error_number();
  PyErr_SetObject(type.ptr(), error.ptr());
  throw nb::python_error();
}

}  // namespace kvx::bind
