"""Memory of other libraries: where it lies and how, without importing any of them.

`describe` reads NumPy arrays, DLPack, `__cuda_array_interface__` and the buffer protocol; the
result keeps the memory alive. `stream_handle` does the same for CUDA streams.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvx.errors import UsageError
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

# DLDeviceType of dlpack.h
_DLPACK_CPU, _DLPACK_CUDA, _DLPACK_CUDA_HOST = 1, 2, 3
_DLPACK_VERSION = (1, 0)
# Asks the producer to leave its streams alone: kvx is told by its caller what to wait for.
_NO_ORDER = -1

LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
_CUDA_STREAM_VERSION = 0
_CUDA_ARRAY_VERSIONS = (2, 3)


class MemoryKind(enum.StrEnum):
    """Where memory lies."""

    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of somebody else, as bytes at an address; keeps it alive.

    Attributes:
        address: Of the first element; a device address when `kind` is DEVICE.
        shape: Elements of each dimension.
        strides_bytes: Bytes from one element to the next, for each dimension.
        item_bytes: Bytes of an element.
        is_writable: Whether its owner lets others write.
        kind: Where it lies. Host memory that a GPU can reach is HOST.
        device_ordinal: Number of the device; -1 for host memory.
        owner: What keeps the memory alive.
        stream: CUDA stream its producer works on, as handle or `LEGACY_STREAM` or
            `PER_THREAD_STREAM`; use the memory only after what is in it. None: nothing to wait for.
    """

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    item_bytes: int
    is_writable: bool
    kind: MemoryKind
    device_ordinal: int
    owner: object
    stream: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes that one index of the first dimension stands for."""
        return math.prod(self.shape[1:]) * self.item_bytes

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether what one index of the first dimension stands for is one run of bytes."""
        return not math.prod(self.shape) or all(
            count == 1 or stride == expected
            for count, stride, expected in zip(
                self.shape[1:],
                self.strides_bytes[1:],
                _contiguous_strides(self.shape, self.item_bytes)[1:],
                strict=True,
            )
        )

    def part(self, index: int) -> Buffer:
        """Return what lies at an index of the first dimension."""
        return replace(
            self,
            address=self.address + index * self.strides_bytes[0],
            shape=self.shape[1:],
            strides_bytes=self.strides_bytes[1:],
        )


class _DlpackProducer(Protocol):
    def __dlpack__(self, **arguments: object) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


def describe(buffer: object, *, is_writable_needed: bool = False) -> Buffer:
    """Tell where and how memory of another library lies; copies nothing, orders nothing.

    Args:
        buffer: A NumPy array, or anything with DLPack, `__cuda_array_interface__` (2 or 3) or the
            buffer protocol; PyTorch and CuPy arrays and cuda.core buffers are such things.
        is_writable_needed: Refuse read-only memory.

    Raises:
        UsageError: It is none of these, lies where kvx cannot reach, or is read-only.

    Sources: the DLPack and CUDA Array Interface specifications.
    """
    found = _described(buffer)
    if is_writable_needed and not found.is_writable:
        raise UsageError(f"{type(buffer).__name__}: it is read-only; pass writable memory")
    return found


def stream_handle(stream: object) -> int:
    """Return the CUstream of a stream of any library.

    Args:
        stream: The handle itself, or an object with `__cuda_stream__` (cuda.core), `ptr` (CuPy) or
            `cuda_stream` (PyTorch).

    Raises:
        UsageError: It is no stream, or one of the default streams. Work on the legacy one waits for
            all others and they for it, so copies would stop the model; the per-thread one is
            another stream on every thread, and kvx has threads of its own.
    """
    handle = _handle_of(stream)
    if handle in (0, LEGACY_STREAM):
        raise UsageError(
            "the legacy default stream orders every other stream behind it, so copies would stop "
            "the model; pass a stream that was created (non-blocking)"
        )
    if handle == PER_THREAD_STREAM:
        raise UsageError(
            "the per-thread default stream is another stream on every thread, and kvx has threads "
            "of its own; pass a stream that was created"
        )
    if handle < 0:
        raise UsageError(f"{handle} is no stream handle")
    return handle


def _described(buffer: object) -> Buffer:
    if isinstance(buffer, Buffer):
        return buffer
    if isinstance(buffer, np.ndarray):
        return _of_array(buffer)
    # A class has the functions of its instances, and no memory.
    if isinstance(buffer, type):
        return _of_bytes(buffer)
    if hasattr(buffer, "__dlpack__") and hasattr(buffer, "__dlpack_device__"):
        return _of_dlpack(buffer)
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is not None:
        return _of_cuda_array(buffer, interface)
    return _of_bytes(buffer)


def _of_array(array: np.ndarray) -> Buffer:
    if array.dtype.hasobject:
        raise UsageError(f"an array of {array.dtype} holds references, not bytes")
    return Buffer(
        array.ctypes.data, array.shape, array.strides, array.itemsize,
        array.flags.writeable, MemoryKind.HOST, -1, array,
    )  # fmt: skip


def _of_dlpack(producer: _DlpackProducer) -> Buffer:
    device_type, _ = producer.__dlpack_device__()
    arguments = {"stream": _NO_ORDER} if device_type == _DLPACK_CUDA else {}
    try:
        try:
            capsule = producer.__dlpack__(**arguments, max_version=_DLPACK_VERSION)
        except TypeError:  # a producer from before versions
            capsule = producer.__dlpack__(**arguments)
    except (BufferError, RuntimeError) as error:
        raise UsageError(
            f"{type(producer).__name__}: it does not hand its memory over: {error}"
        ) from error
    tensor = _core.DlpackTensor(capsule)
    if tensor.is_copy:
        raise UsageError(f"{type(producer).__name__}: it hands over a copy, not its memory")
    return Buffer(
        tensor.address, tensor.shape, tensor.strides_bytes, tensor.item_bytes,
        not tensor.is_read_only, *_place_of(*tensor.device), tensor,
    )  # fmt: skip


def _place_of(device_type: int, device_id: int) -> tuple[MemoryKind, int]:
    if device_type in (_DLPACK_CPU, _DLPACK_CUDA_HOST):
        return MemoryKind.HOST, -1
    if device_type == _DLPACK_CUDA:
        return MemoryKind.DEVICE, device_id
    raise UsageError(
        f"memory on a device of DLPack type {device_type}; kvx moves host memory (1, 3) and CUDA "
        "device memory (2)"
    )


def _of_cuda_array(owner: object, interface: Mapping[str, object]) -> Buffer:
    try:
        return _read_interface(owner, interface)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{type(owner).__name__}: its __cuda_array_interface__ cannot be read: "
            f"{type(error).__name__} {error}"
        ) from error


def _read_interface(owner: object, interface: Mapping[str, Any]) -> Buffer:
    shape = tuple(int(count) for count in interface["shape"])
    address, is_read_only = interface["data"]
    item_bytes = np.dtype(interface["typestr"]).itemsize
    strides = interface.get("strides")
    stream = interface.get("stream")
    if interface["version"] not in _CUDA_ARRAY_VERSIONS:
        raise ValueError(f"version {interface['version']}; kvx reads {_CUDA_ARRAY_VERSIONS}")
    if strides is not None and len(strides) != len(shape):
        raise ValueError(f"{len(shape)} dimensions but {len(strides)} strides")
    if interface.get("mask") is not None:
        raise ValueError("its mask would be lost")
    # 0 could be either default stream, so version 3 forbids it.
    if stream is not None and (not isinstance(stream, int) or stream <= 0):
        raise ValueError(f"its stream is {stream!r}")
    return Buffer(
        int(address or 0), shape,
        _contiguous_strides(shape, item_bytes) if strides is None else tuple(map(int, strides)),
        item_bytes, not is_read_only, MemoryKind.DEVICE, _ordinal_of(owner), owner, stream,
    )  # fmt: skip


def _ordinal_of(owner: object) -> int:
    """Return the device of an array that says it as CuPy (`device.id`) or PyTorch does; else 0.

    The interface itself does not tell. Copies ask the driver whose memory an address is before
    they begin, so a wrong guess is refused there.
    """
    device = getattr(owner, "device", None)
    for ordinal in (getattr(device, "id", None), getattr(device, "index", None), device):
        if isinstance(ordinal, int):
            return ordinal
    return 0


def _of_bytes(buffer: object) -> Buffer:
    try:
        array = np.asarray(memoryview(buffer))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UsageError(
            f"{type(buffer).__name__}: no memory that kvx can read; it has neither DLPack, nor "
            "__cuda_array_interface__, nor the buffer protocol"
        ) from None
    return _of_array(array)


def _contiguous_strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) * item_bytes for i in range(len(shape)))


def _handle_of(stream: object) -> int:
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        # A method by the protocol; cuda.core once had a property.
        version, handle = protocol() if callable(protocol) else protocol
        if version != _CUDA_STREAM_VERSION:
            raise UsageError(
                f"{type(stream).__name__}: version {version} of __cuda_stream__; kvx knows "
                f"{_CUDA_STREAM_VERSION}"
            )
        return int(handle)
    for name in ("ptr", "cuda_stream"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise UsageError(
        f"{type(stream).__name__}: no CUDA stream; pass its handle, or an object with "
        "__cuda_stream__, ptr or cuda_stream"
    )
