"""The simulated CUDA driver: builds the library and steers it. See `tests/sim/cuda/control.h`.

The library carries the name of the real one, so that whoever opens `libcuda.so.1` in a process that
has loaded it here gets it.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import subprocess
from enum import IntEnum
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "sim"
LIBRARY = BUILD / "simulated_cuda" / "libcuda.so.1"
# All that the library is made of.
SOURCE_FOLDERS = ("tests/sim/cuda", "kvx_ext/src/kernels", "kvx_ext/src/shim/cuda")
_TEXT_BYTES = 1024


class Engine(IntEnum):
    """A copy engine; the third also runs kernels."""

    HOST_TO_DEVICE = 0
    DEVICE_TO_HOST = 1
    ON_DEVICE = 2


def _is_current() -> bool:
    if not LIBRARY.exists():
        return False
    built = LIBRARY.stat().st_mtime
    sources = [ROOT / "CMakeLists.txt"]
    for folder in SOURCE_FOLDERS:
        # The folder itself is newer when a file came or went.
        sources += [ROOT / folder, *(ROOT / folder).rglob("*")]
    return all(source.stat().st_mtime <= built for source in sources if source.exists())


def _build() -> None:
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), "-DKVX_NATIVE_TESTS=ON",
        # The first test that asks waits for it: less optimised is sooner there.
        "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
    ]  # fmt: skip
    build = ["cmake", "--build", str(BUILD), "--target", "simulated_cuda", "-j2"]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    LIBRARY.touch()  # a build that had nothing to do must not be asked for again


@cache
def library_path() -> Path:
    """Return the path of the library, built first if its sources are newer.

    Raises:
        RuntimeError: It does not build; with the compiler's words.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    # Test processes that run at once build it once.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current():
            _build()
    return LIBRARY


def why_not() -> str | None:
    """Return why the library cannot be built here, None if it can."""
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class SimulatedDriver:
    """The one simulated driver of this process.

    Attributes:
        library: The loaded library, for calls to the driver itself.
        path: Where it lies.
    """

    def __init__(self) -> None:
        """Load the library, built first if need be.

        Raises:
            RuntimeError: It does not build.
        """
        self.path = library_path()
        self.library = ctypes.CDLL(str(self.path))
        self._declare()

    def _declare(self) -> None:
        pointer, size, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        text, number = ctypes.c_char_p, ctypes.c_int
        signatures = {
            "reset": (None, ()),
            "set_devices": (None, (number,)),
            "set_total_memory": (None, (size,)),
            "set_attribute": (None, (number, number)),
            "set_driver_version": (None, (number,)),
            "set_bandwidth": (None, (number, word)),
            "set_latency": (None, (number, word)),
            "set_shuffle_seed": (None, (word,)),
            "set_has_batch_copy": (None, (number,)),
            "set_has_stream_values": (None, (number,)),
            "set_has_peer_access": (None, (number,)),
            "inject": (None, (text, word, number, number)),
            "delay": (None, (text, word)),
            "freeze": (None, (number, number)),
            "fail_context": (None, (number, number)),
            "convictions_count": (word, ()),
            "conviction": (ctypes.c_int64, (word, text, size)),
            "clear_convictions": (None, ()),
            "count": (ctypes.c_int64, (text,)),
            "copy_to_device": (number, (word, pointer, size)),
            "copy_from_device": (number, (pointer, word, size)),
            "memset": (number, (word, number, size)),
            "host_access": (None, (pointer, size, number)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.library, f"kvxsim_{name}")
            function.restype = result
            function.argtypes = arguments

    def reset(self) -> None:
        """End all streams, free everything, restore every setting."""
        self.library.kvxsim_reset()

    def set_devices(self, count: int) -> None:
        """Set the number of devices, 0 to 8."""
        self.library.kvxsim_set_devices(count)

    def set_total_memory(self, total_bytes: int) -> None:
        """Set the memory of every device."""
        self.library.kvxsim_set_total_memory(total_bytes)

    def set_attribute(self, attribute: int, value: int) -> None:
        """Set what the devices answer for a CUdevice_attribute."""
        self.library.kvxsim_set_attribute(attribute, value)

    def set_driver_version(self, version: int) -> None:
        """Set the version of the driver, e.g. 12080; entry points that are newer are not there."""
        self.library.kvxsim_set_driver_version(version)

    def set_bandwidth(self, engine: Engine, bytes_per_s: int) -> None:
        """Set how fast an engine copies; 0: in no time."""
        self.library.kvxsim_set_bandwidth(engine, bytes_per_s)

    def set_latency(self, engine: Engine, latency_s: float) -> None:
        """Set what every operation of an engine takes beside its bytes."""
        self.library.kvxsim_set_latency(engine, round(latency_s * 1e9))

    def set_shuffle_seed(self, seed: int) -> None:
        """Set what the order of copies within a batch is drawn from."""
        self.library.kvxsim_set_shuffle_seed(seed)

    def set_has_batch_copy(self, *, has_batch_copy: bool) -> None:
        """Set whether there is cuMemcpyBatchAsync."""
        self.library.kvxsim_set_has_batch_copy(has_batch_copy)

    def set_has_stream_values(self, *, has_stream_values: bool) -> None:
        """Set whether there are cuStreamWaitValue32 and cuStreamWriteValue32."""
        self.library.kvxsim_set_has_stream_values(has_stream_values)

    def set_has_peer_access(self, *, has_peer_access: bool) -> None:
        """Set whether devices can reach each other's memory."""
        self.library.kvxsim_set_has_peer_access(has_peer_access)

    def inject(self, symbol: str, result: int, *, nth: int = 1, is_sticky: bool = False) -> None:
        """Fail the nth call from now on of an entry point, 1 being the next."""
        self.library.kvxsim_inject(symbol.encode(), nth, result, is_sticky)

    def delay(self, symbol: str, delay_s: float) -> None:
        """Make every call of an entry point wait first; 0 ends that."""
        self.library.kvxsim_delay(symbol.encode(), round(delay_s * 1e6))

    def freeze(self, engine: Engine) -> None:
        """Keep an engine's copies from completing."""
        self.library.kvxsim_freeze(engine, 1)

    def thaw(self, engine: Engine) -> None:
        """Let them complete."""
        self.library.kvxsim_freeze(engine, 0)

    def fail_context(self, result: int, *, device: int = 0) -> None:
        """Lose a device's context, as a failing kernel would; 0 brings it back."""
        self.library.kvxsim_fail_context(device, result)

    def convictions(self) -> list[str]:
        """Return what the driver's caller did wrong, as "kind: text"."""
        found = []
        for index in range(self.library.kvxsim_convictions_count()):
            text = ctypes.create_string_buffer(_TEXT_BYTES)
            self.library.kvxsim_conviction(index, text, _TEXT_BYTES)
            found.append(text.value.decode())
        return found

    def clear_convictions(self) -> None:
        """Forget them."""
        self.library.kvxsim_clear_convictions()

    def take_convictions(self) -> list[str]:
        """Return the kinds alone, each once, in order of appearance, and forget them all."""
        kinds = dict.fromkeys(text.partition(":")[0] for text in self.convictions())
        self.clear_convictions()
        return list(kinds)

    def count(self, name: str) -> int:
        """Return a count by the name it has in `control.h`.

        Raises:
            KeyError: There is none of that name.
        """
        value: int = self.library.kvxsim_count(name.encode())
        if value < 0:
            raise KeyError(name)
        return value

    def write(self, target: int, data: bytes) -> None:
        """Write device memory, at once.

        Raises:
            ValueError: That is no device memory.
        """
        if self.library.kvxsim_copy_to_device(target, data, len(data)) != 0:
            raise ValueError(f"{target:#x} + {len(data)} is no device memory")

    def read(self, source: int, num_bytes: int) -> bytes:
        """Read device memory, at once.

        Raises:
            ValueError: That is no device memory.
        """
        data = ctypes.create_string_buffer(num_bytes)
        if self.library.kvxsim_copy_from_device(data, source, num_bytes) != 0:
            raise ValueError(f"{source:#x} + {num_bytes} is no device memory")
        return data.raw

    def fill(self, target: int, value: int, num_bytes: int) -> None:
        """Set every byte of device memory, at once.

        Raises:
            ValueError: That is no device memory.
        """
        if self.library.kvxsim_memset(target, value, num_bytes) != 0:
            raise ValueError(f"{target:#x} + {num_bytes} is no device memory")

    def host_access(self, address: int, num_bytes: int, *, is_write: bool) -> None:
        """Announce that the host reads or writes memory that copies may touch."""
        self.library.kvxsim_host_access(address, num_bytes, is_write)
