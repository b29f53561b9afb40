// Memory handed over by DLPack, as address, shape and strides. nanobind's own import neither lets
// the producer's stream be left alone nor takes types of its own invention, so the capsule is read
// here. Source: dmlc/dlpack, dlpack.h, versions 0 (unversioned) and 1.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};

struct DlManagedVersioned {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*deleter)(DlManagedVersioned*);
  uint64_t flags;
  DlTensor tensor;
};

constexpr uint32_t kMajor = 1;
constexpr uint64_t kReadOnly = 1;
constexpr uint64_t kCopied = 2;

// A capsule that was taken; gives the tensor back to its producer when it dies.
class DlpackTensor {
 public:
  explicit DlpackTensor(const nb::object& capsule) {
    PyObject* object = capsule.ptr();
    if (PyCapsule_IsValid(object, "dltensor_versioned") != 0) {
      auto* managed =
          static_cast<DlManagedVersioned*>(PyCapsule_GetPointer(object, "dltensor_versioned"));
      if (managed->major != kMajor) {
        raise_if_error({Code::kUsage, "DLPack version " + std::to_string(managed->major) +
                                          " was handed over; kvx reads version 1"});
      }
      check(managed->tensor);
      take(object, "used_dltensor_versioned");
      versioned_ = managed;
    } else if (PyCapsule_IsValid(object, "dltensor") != 0) {
      auto* managed = static_cast<DlManaged*>(PyCapsule_GetPointer(object, "dltensor"));
      check(managed->tensor);
      take(object, "used_dltensor");
      unversioned_ = managed;
    } else {
      raise_if_error({Code::kUsage, "not a DLPack capsule, or one that was consumed before"});
    }
  }
  ~DlpackTensor() {
    if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
    if (unversioned_ != nullptr && unversioned_->deleter != nullptr) {
      unversioned_->deleter(unversioned_);
    }
  }
  DlpackTensor(const DlpackTensor&) = delete;
  DlpackTensor& operator=(const DlpackTensor&) = delete;

  const DlTensor& tensor() const {
    return versioned_ != nullptr ? versioned_->tensor : unversioned_->tensor;
  }
  uint64_t flags() const { return versioned_ != nullptr ? versioned_->flags : 0; }
  int64_t item_bytes() const { return tensor().type_bits * tensor().type_lanes / 8; }

 private:
  static void take(PyObject* capsule, const char* name) {
    if (PyCapsule_SetName(capsule, name) != 0) throw nb::python_error();
  }

  static void check(const DlTensor& tensor) {
    if (tensor.type_bits * tensor.type_lanes % 8 != 0) {
      raise_if_error({Code::kUsage, "elements of " + std::to_string(tensor.type_bits) +
                                        " bits are no whole bytes; hand over a uint8 view"});
    }
  }

  DlManagedVersioned* versioned_ = nullptr;
  DlManaged* unversioned_ = nullptr;
};

nb::tuple shape_of(const DlpackTensor& self) {
  nb::list shape;
  for (int32_t i = 0; i < self.tensor().ndim; ++i) shape.append(self.tensor().shape[i]);
  return nb::tuple(shape);
}

nb::tuple strides_of(const DlpackTensor& self) {
  const DlTensor& tensor = self.tensor();
  const auto ndim = static_cast<size_t>(tensor.ndim);
  std::vector<int64_t> strides(ndim);
  int64_t contiguous = 1;
  for (size_t i = ndim; i-- > 0;) {
    strides[i] = (tensor.strides == nullptr ? contiguous : tensor.strides[i]) * self.item_bytes();
    contiguous *= tensor.shape[i];
  }
  nb::list result;
  for (const int64_t stride : strides) result.append(stride);
  return nb::tuple(result);
}

}  // namespace

void bind_dlpack(nb::module_& module) {
  nb::class_<DlpackTensor>(
      module, "DlpackTensor",
      "What a DLPack capsule describes; its memory is given back when this dies.")
      .def(nb::init<const nb::object&>(), "capsule"_a,
           "Consume a `dltensor` or `dltensor_versioned` capsule. Raises UsageError when it was "
           "consumed before, or its elements are no whole bytes.")
      .def_prop_ro(
          "address",
          [](const DlpackTensor& self) {
            return reinterpret_cast<uint64_t>(self.tensor().data) + self.tensor().byte_offset;
          },
          "Address of the first element, host or device.")
      .def_prop_ro("shape", &shape_of, nb::sig("def shape(self) -> tuple[int, ...]"), "Elements.")
      .def_prop_ro("strides_bytes", &strides_of,
                   nb::sig("def strides_bytes(self) -> tuple[int, ...]"),
                   "Bytes from one element to the next, for each dimension.")
      .def_prop_ro("item_bytes", &DlpackTensor::item_bytes, "Bytes of an element.")
      .def_prop_ro(
          "device",
          [](const DlpackTensor& self) {
            return nb::make_tuple(self.tensor().device_type, self.tensor().device_id);
          },
          nb::sig("def device(self) -> tuple[int, int]"), "DLDeviceType and number.")
      .def_prop_ro(
          "is_read_only", [](const DlpackTensor& self) { return (self.flags() & kReadOnly) != 0; },
          "Whether the producer forbids writing; older ones cannot say so.")
      .def_prop_ro(
          "is_copy", [](const DlpackTensor& self) { return (self.flags() & kCopied) != 0; },
          "Whether the producer made a copy, so that this is not its memory.");
}

}  // namespace kvx::bind
