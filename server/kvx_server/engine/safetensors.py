"""Reads tensors from a `.safetensors` file without trusting its header.

The format is 8 bytes of little-endian header size, a JSON header, then raw tensor bytes; see
https://huggingface.co/docs/safetensors. Every offset and size is checked against the file before
any tensor is touched, so a damaged file ends in an error and never in a read outside of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.errors import ModelFormatError

# What the format's own reader accepts at most.
_HEADER_BYTES_MAX = 100_000_000
_SIZE_BYTES = 8
# Little-endian on disk, which is what NumPy runs on wherever this engine does.
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One file of tensors, mapped into memory; tensors are copied out as float32."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header.

        Raises:
            ModelFormatError: The file cannot be opened, is truncated, or its header does not
                describe the bytes that follow it.
        """
        self._path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            message = f"{path} cannot be opened: {error}"
            raise ModelFormatError(message) from error
        self._entries = self._read_header()

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(self._entries)

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32, in the shape of the header.

        Raises:
            KeyError: The file has no such tensor.
        """
        entry = self._entries[name]
        raw: NDArray[np.uint8] = np.asarray(self._bytes[entry.start : entry.end])
        if entry.dtype == "BF16":
            # bfloat16 is no numpy type: it is the upper half of a float32.
            halves = raw.view(np.uint16).reshape(entry.shape).astype(np.uint32)
            return np.left_shift(halves, np.uint32(16)).view(np.float32)
        values = raw.view(np.float16 if entry.dtype == "F16" else np.float32)
        return values.reshape(entry.shape).astype(np.float32)

    def _read_header(self) -> dict[str, _Entry]:
        if len(self._bytes) < _SIZE_BYTES:
            self._refuse(f"only {len(self._bytes)} bytes long")
        header_bytes = int.from_bytes(self._bytes[:_SIZE_BYTES].tobytes(), "little")
        data_start = _SIZE_BYTES + header_bytes
        if header_bytes > _HEADER_BYTES_MAX or data_start > len(self._bytes):
            self._refuse(f"header of {header_bytes} bytes in {len(self._bytes)} bytes")
        try:
            header = json.loads(self._bytes[_SIZE_BYTES:data_start].tobytes())
        except (ValueError, RecursionError) as error:
            self._refuse(f"header is not JSON: {error}")
        if not isinstance(header, dict):
            self._refuse("header is not an object")
        header.pop("__metadata__", None)
        return {name: self._entry(name, value, data_start) for name, value in header.items()}

    def _entry(self, name: str, value: object, data_start: int) -> _Entry:
        if not isinstance(value, dict):
            self._refuse(f"tensor {name!r} is described by {value!r}")
        dtype = value.get("dtype")
        if dtype not in _ITEM_BYTES:
            self._refuse(f"tensor {name!r} has dtype {dtype!r}, not one of {list(_ITEM_BYTES)}")
        shape, offsets = _sizes(value.get("shape")), _sizes(value.get("data_offsets"))
        if shape is None or offsets is None or len(offsets) != len(("start", "end")):
            self._refuse(f"tensor {name!r} has no readable shape and data_offsets: {value!r}")
        start, end = (data_start + offset for offset in offsets)
        needed_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
        if end > len(self._bytes) or end - start != needed_bytes:
            self._refuse(
                f"tensor {name!r} needs {needed_bytes} bytes and claims {start} to {end} "
                f"of {len(self._bytes)}"
            )
        return _Entry(dtype, tuple(shape), start, end)

    def _refuse(self, what: str) -> NoReturn:
        message = f"{self._path} is not a readable safetensors file: {what}"
        raise ModelFormatError(message)


def _sizes(values: object) -> list[int] | None:
    """Return a list of integers of at least 0, or None when it is anything else."""
    if not isinstance(values, list):
        return None
    if not all(type(value) is int and value >= 0 for value in values):
        return None
    return values
