"""Run kvx's GPU kernels on the CPU: compiled as plain C++, every access checked."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kvx_ext/src/kernels"
_BUILD = ROOT / "build/sim"
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_UNITS = (ROOT / "tests/sim/kernel_library.cpp", ROOT / "tests/sim/cuda/kernels.cpp")

_U64, _I64, _U32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint32

Dim3 = tuple[int, int, int]


class Permute(ctypes.Structure):
    """kernel::PermuteParameters."""

    _fields_ = (
        ("target", _U64),
        ("source", _U64),
        ("target_ids", _U64),
        ("source_ids", _U64),
        ("target_strides", _I64 * 5),
        ("source_strides", _I64 * 5),
        ("sizes", _U32 * 5),
        ("run_bytes", _U32),
    )


class Reshard(ctypes.Structure):
    """kernel::ReshardParameters."""

    _fields_ = (
        ("whole", _U64),
        ("parts", _U64 * 16),
        ("whole_block_stride", _I64),
        ("part_block_stride", _I64),
        ("blocks", _U32),
        ("rows", _U32),
        ("part_count", _U32),
        ("run_bytes", _U32),
        ("is_merge", _U32),
        ("reserved", _U32),
    )


class Quantise(ctypes.Structure):
    """kernel::QuantiseParameters."""

    _fields_ = (
        ("wide", _U64),
        ("narrow", _U64),
        ("scales", _U64),
        ("partials", _U64),
        ("wide_strides", _I64 * 3),
        ("narrow_strides", _I64 * 3),
        ("blocks", _U32),
        ("tokens", _U32),
        ("heads", _U32),
        ("dim", _U32),
        ("wide_kind", _U32),
        ("reserved", _U32),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (("address", _U64), ("memory", _U64), ("bytes", _U64), ("is_writable", _U64))


class _Refusal(ctypes.Structure):
    _fields_ = (("address", _U64), ("bytes", _U64), ("is_write", _U64))


class AccessRefused(Exception):
    """A kernel touched memory that is not its own.

    Attributes:
        address: Where, as the device sees it.
        size_bytes: How much at once.
        is_write: Whether it was to be written.
    """

    def __init__(self, address: int, size_bytes: int, *, is_write: bool) -> None:
        super().__init__(f"{'write' if is_write else 'read'} of {size_bytes} at {address:#x}")
        self.address = address
        self.size_bytes = size_bytes
        self.is_write = is_write


@dataclass(slots=True)
class Gpu:
    """Buffers at device addresses, and the kernels that run on them.

    Addresses say nothing about the arrays': they are as aligned as the test asks for, and between
    buffers lies memory that nobody may touch.
    """

    _arrays: list[tuple[int, npt.NDArray[np.uint8], bool]] = field(default_factory=list)
    _next: int = 0x7F00_0000_0000

    def place(self, array: npt.NDArray[Any], *, offset: int = 0, is_writable: bool = True) -> int:
        """Give an array, C-contiguous, an address that is `offset` behind a multiple of 256."""
        assert array.flags.c_contiguous
        address = self._next + offset
        self._arrays.append((address, array.reshape(-1).view(np.uint8), is_writable))
        self._next += (offset + array.nbytes + 4096) // 256 * 256
        return address

    def run(
        self,
        name: str,
        *parameters: int | ctypes.Structure,
        grid: Dim3 = (2, 1, 1),
        block: Dim3 = (64, 1, 1),
    ) -> None:
        """Run a kernel to its end.

        Raises:
            AccessRefused: It left the buffers, wrote what it may not write, or was misaligned.
        """
        values = [_U64(each) if isinstance(each, int) else each for each in parameters]
        assert [ctypes.sizeof(value) for value in values] == parameter_bytes(name)
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        buffers = (_Buffer * len(self._arrays))(
            *(
                (address, array.ctypes.data, array.nbytes, is_writable)
                for address, array, is_writable in self._arrays
            )
        )
        refusal = _Refusal()
        dims = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)
        if not library().kvx_sim_run(
            name.encode(), *dims, addresses, buffers, _U64(len(buffers)), ctypes.byref(refusal)
        ):
            raise AccessRefused(refusal.address, refusal.bytes, is_write=bool(refusal.is_write))


def kernel_names() -> list[str]:
    """Return the names of all kernels."""
    names: list[str] = []
    while (name := library().kvx_sim_kernel_name(_U64(len(names)))) is not None:
        names.append(name.decode())
    return names


def parameter_bytes(name: str) -> list[int]:
    """Return the sizes of a kernel's parameters; empty when there is no such kernel."""
    sizes = (_U64 * 8)()
    count = library().kvx_sim_parameter_bytes(name.encode(), sizes, _U64(len(sizes)))
    return list(sizes)[:count]


@cache
def library() -> ctypes.CDLL:
    """Build the kernels unless that was done, and load them."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "a C++ compiler is needed"
    read = [*_UNITS, ROOT / "tests/sim/cuda/kernels.h", ROOT / "kvx_ext/src/shim/cuda/portable.h"]
    read += sorted(path for path in KERNELS.iterdir() if path.suffix in {".cu", ".h"})
    state = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode())
    for path in read:
        state.update(path.read_bytes())
    _BUILD.mkdir(parents=True, exist_ok=True)
    built = _BUILD / f"kernels-{state.hexdigest()[:16]}.so"
    # Test processes run side by side; one of them builds.
    with (_BUILD / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for old in _BUILD.glob("kernels-*.so"):
                old.unlink()
            unfinished = built.with_suffix(".new")
            include = ("-I", str(ROOT / "kvx_ext/src"))
            units = map(str, _UNITS)
            subprocess.run([compiler, *_FLAGS, *include, "-o", unfinished, *units], check=True)
            unfinished.rename(built)
        loaded = ctypes.CDLL(str(built))
    loaded.kvx_sim_kernel_name.restype = ctypes.c_char_p
    loaded.kvx_sim_parameter_bytes.restype = _U64
    return loaded
