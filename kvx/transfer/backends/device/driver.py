"""The CUDA driver: is there one?"""

from __future__ import annotations

import ctypes
import functools

LIBRARY = "libcuda.so.1"


def why_no_driver() -> str:
    """Return why there is no CUDA driver; empty when there is one. Touches no device."""
    try:
        _loaded()
    except OSError as error:
        return f"there is no CUDA driver ({error}): install the NVIDIA driver"
    return ""


@functools.cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(LIBRARY)
