"""A bucket in memory that several caches share, and that fails as it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.cache.s3.store import LIST_PAGE_MAX, ObjectError, ObjectFacts, ObjectFault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence


@dataclass
class Bucket:
    """Objects by name, and what was done to them. Thread-safe.

    Attributes:
        objects: Bytes and time of each.
        calls: How often each verb was called.
        latency_s: How long each call takes.
        tamper: Returns what arrives instead of the bytes that were read.
        fault: Returns why a call (verb, name) fails, or None; called for each.
        is_frozen: While it is set no call ends.
    """

    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    latency_s: float = 0.0
    fault: Callable[[str, str], ObjectFault | None] = lambda _verb, _name: None
    tamper: Callable[[bytes], bytes] = lambda data: data
    is_frozen: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> list[str]:
        """Return the names of all objects, in order."""
        with self.lock:
            return sorted(self.objects)

    def alter(self, name: str, offset: int, flip: int = 1) -> None:
        """Flip bits of one byte."""
        with self.lock:
            data, at = self.objects[name]
            damaged = bytearray(data)
            damaged[offset] ^= flip
            self.objects[name] = (bytes(damaged), at)


class MemoryStore:
    """One client of a bucket; see `ObjectStore`."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.is_closed = False

    async def _enter(self, verb: str, name: str) -> None:
        bucket = self.bucket
        bucket.calls[verb] += 1
        await asyncio.sleep(bucket.latency_s)
        while bucket.is_frozen:  # noqa: ASYNC110 - it is thawed on another thread
            await asyncio.sleep(0.005)
        fault = bucket.fault(verb, name)
        if fault is not None:
            raise ObjectError(f"{verb} {name}: as told", fault=fault, key=name)

    async def get(self, name: str, start: int, size_bytes: int) -> memoryview:
        await self._enter("get", name)
        with self.bucket.lock:
            if name not in self.bucket.objects:
                raise ObjectError(f"{name} is not there", fault=ObjectFault.MISSING, key=name)
            data = self.bucket.objects[name][0][start : start + size_bytes]
        data = self.bucket.tamper(data)
        if len(data) != size_bytes:
            raise ObjectError(f"{name} is shorter", fault=ObjectFault.RANGE, key=name)
        return memoryview(data)

    async def head(self, name: str) -> ObjectFacts:
        await self._enter("head", name)
        with self.bucket.lock:
            if name not in self.bucket.objects:
                raise ObjectError(f"{name} is not there", fault=ObjectFault.MISSING, key=name)
            data, at = self.bucket.objects[name]
        return ObjectFacts(name, len(data), at)

    async def put(self, name: str, body: memoryview, *, only_if_absent: bool) -> None:
        await self._enter("put", name)
        with self.bucket.lock:
            if only_if_absent and name in self.bucket.objects:
                raise ObjectError(f"{name} is there", fault=ObjectFault.CONFLICT, key=name)
            self.bucket.objects[name] = (bytes(body), time.time())

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectFacts]]:
        await self._enter("list", prefix)
        names = [one for one in self.bucket.names() if one.startswith(prefix) and one > after]
        for start in range(0, len(names), LIST_PAGE_MAX):
            page = names[start : start + LIST_PAGE_MAX]
            with self.bucket.lock:
                found = [(one, self.bucket.objects[one]) for one in page]
            yield [ObjectFacts(one, len(data), at) for one, (data, at) in found]

    async def delete(self, names: Sequence[str]) -> None:
        await self._enter("delete", "")
        with self.bucket.lock:
            for name in names:
                self.bucket.objects.pop(name, None)

    async def close(self) -> None:
        self.is_closed = True
