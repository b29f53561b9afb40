"""DLPack capsules made by hand: of any device, any stride, and counting what is given back."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

CPU, CUDA, CUDA_HOST, MANAGED = 1, 2, 3, 13
READ_ONLY, COPIED = 1, 2


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


def _capsule(struct: ctypes.Structure, name: bytes) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(struct), name, None)


@dataclass
class Producer:
    """An array of another library; `returned` counts deleter calls, `asked` what was asked for."""

    address: int = 0x7F00_0000_0000
    shape: tuple[int, ...] = (4, 64)
    strides: tuple[int, ...] | None = None
    device: tuple[int, int] = (CUDA, 0)
    bits: int = 8
    lanes: int = 1
    flags: int = 0
    byte_offset: int = 0
    major: int = 1
    is_versioned: bool = True
    returned: int = 0
    asked: list[dict[str, object]] = field(default_factory=list)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **arguments: object) -> object:
        self.asked.append(arguments)
        if not self.is_versioned and "max_version" in arguments:
            raise TypeError("unexpected keyword argument 'max_version'")
        self._deleter = _DELETER(self._take_back)
        tensor = self._tensor()
        if self.is_versioned:
            versioned = ManagedVersioned(self.major, 0, None, self._deleter, self.flags, tensor)
            self._struct: ctypes.Structure = versioned
            return _capsule(versioned, b"dltensor_versioned")
        self._struct = Managed(tensor, None, self._deleter)
        return _capsule(self._struct, b"dltensor")

    def _take_back(self, _managed: int) -> None:
        self.returned += 1

    def _tensor(self) -> Tensor:
        numbers = ctypes.c_int64 * len(self.shape)
        self._shape = numbers(*self.shape)
        self._strides = None if self.strides is None else numbers(*self.strides)
        return Tensor(
            self.address, *self.device, len(self.shape), 1, self.bits, self.lanes,
            self._shape, self._strides, self.byte_offset,
        )  # fmt: skip


class CudaArray:
    """Something with `__cuda_array_interface__` and nothing else."""

    def __init__(self, address: int = 0x7F00_0000_0000, **changes: object) -> None:
        self.__cuda_array_interface__ = {
            "shape": (4, 64), "typestr": "|u1", "data": (address, False), "version": 3, **changes,
        }  # fmt: skip
