"""A bucket by obstore, which won the measurement (docs/decisions/0012).

Bytes that are sent are not copied, bytes that arrive are handed out where the client has put them.
Its retries are off and its time limit is only a backstop: how hard is tried is `effort`'s affair.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvx.cache.s3.credentials import provider_for
from kvx.cache.s3.faults import Place, explain
from kvx.cache.s3.store import (
    DELETE_BATCH_MAX,
    LIST_PAGE_MAX,
    ObjectError,
    ObjectFacts,
    ObjectFault,
)
from kvx.config import aws_environment, environment_default
from kvx.errors import ConfigError, UnavailableError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from obstore import PutMode
    from obstore.store import ClientConfig, S3Config, S3Store

    from kvx.tier_config import S3TierConfig

_BACKSTOP_S = 3600.0
_IDLE_S = 30.0
# For so long a bucket that has been there is taken to be there still.
_BUCKET_SEEN_S = 60.0
# Threads of the client hand requests to each other, which costs more than it brings where there are
# few CPUs: of two, one was faster than both (docs/decisions/0012).
_CPUS_PER_THREAD = 4
_THREADS_MAX = 8
# What HEAD answers without saying why: its answers have no body.
_MUTE = frozenset({ObjectFault.MISSING, ObjectFault.DENIED})


def open_store(config: S3TierConfig) -> ObstoreStore:
    """Return the bucket of a tier; nothing is asked of it yet.

    Raises:
        ConfigError: The endpoint is no URL, or the certificates cannot be read.
        UnavailableError: obstore is not here, or a profile is named and botocore is not.
    """
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415 - an extra of kvx
        from obstore.store import MemoryStore, S3Store  # noqa: PLC0415 - the same
    except ImportError as error:
        raise UnavailableError(
            f"a tier of kind s3 needs obstore, which is not here ({error}): pip install 'kvx[s3]'"
        ) from error
    endpoint = _endpoint(config)
    is_hosted = not endpoint and "." not in config.bucket
    settings: S3Config = {
        "region": config.region,
        "skip_signature": config.is_anonymous,
        "unsigned_payload": True,
        "virtual_hosted_style_request": is_hosted,
    }
    if endpoint:
        settings |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
    num_threads = min(_THREADS_MAX, max(1, len(os.sched_getaffinity(0)) // _CPUS_PER_THREAD))
    with environment_default("TOKIO_WORKER_THREADS", str(num_threads)):
        MemoryStore().put("", b"")  # the first call of a process starts them, for all of it
    provider = None if config.is_anonymous else provider_for(config.profile)
    options = _client(config, endpoint)
    try:
        store = S3Store(
            config.bucket, config=settings, client_options=options,
            retry_config={"max_retries": 0}, credential_provider=provider,
        )  # fmt: skip
    except (BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the bucket {config.bucket!r} cannot be opened: {reason}") from error
    host = f"{config.bucket}." if is_hosted else ""
    shown = endpoint or f"https://{host}s3.{config.region}.amazonaws.com"
    place = Place(config.bucket, shown, config.connect_timeout_s)
    return ObstoreStore(store, place)


def _endpoint(config: S3TierConfig) -> str:
    """Return the URL of the service, without a slash at its end; empty for AWS."""
    found = (config.endpoint or aws_environment().endpoint).rstrip("/")
    if not found:
        return ""
    parts = urlsplit(found)
    if parts.username is not None:
        raise ConfigError(
            "endpoint: a URL with a user in it; set credentials apart", key="endpoint"
        )
    is_url = parts.scheme in {"http", "https"} and bool(parts.hostname)
    if not is_url or parts.query or not found.isascii() or not found.isprintable() or " " in found:
        raise ConfigError(
            f"endpoint: {found!r} is not the URL of a service, such as http://127.0.0.1:9000",
            key="endpoint",
        )
    return found


def _client(config: S3TierConfig, endpoint: str) -> ClientConfig:
    options: ClientConfig = {
        "allow_http": endpoint.startswith("http:"),
        "connect_timeout": timedelta(seconds=config.connect_timeout_s),
        "timeout": timedelta(seconds=_BACKSTOP_S),
        "pool_idle_timeout": timedelta(seconds=_IDLE_S),
        "pool_max_idle_per_host": str(config.max_in_flight),
        "user_agent": "kvx",
    }
    if config.ca_file is not None:
        try:
            options["root_certificate"] = config.ca_file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"ca_file: {config.ca_file} cannot be read: {error.strerror}", key="ca_file"
            ) from error
    return options


class ObstoreStore:
    """One bucket, of one event loop. See `ObjectStore`."""

    def __init__(self, store: S3Store, place: Place) -> None:
        """Wrap what `open_store` has opened."""
        self._store: S3Store | None = store
        self._place = place
        self._bucket_seen_until = 0.0

    async def get(self, name: str, start: int, size_bytes: int) -> memoryview:
        """Return exactly these bytes, where the client has put them; see `ObjectStore`."""
        store = self._opened("get", name)
        with self._explained("get", name):
            found = await store.get_range_async(name, start=start, length=size_bytes)
        self._bucket_is_there()
        if len(found) != size_bytes:
            raise await self._misfit(name, start, size_bytes, len(found))
        return memoryview(found)

    async def head(self, name: str) -> ObjectFacts:
        """Return what is known of an object; see `ObjectStore`."""
        store = self._opened("head", name)
        try:
            with self._explained("head", name):
                found = await store.head_async(name)
        except ObjectError as failure:
            raise await self._reason(name, failure) from None
        self._bucket_is_there()
        return ObjectFacts(name, found["size"], found["last_modified"].timestamp())

    async def put(self, name: str, body: memoryview, *, only_if_absent: bool) -> None:
        """Store an object; see `ObjectStore`.

        `body` is sent from where it lies: it must not change until the call has returned and, where
        that was given up, for as long as anything else holds it.
        """
        store = self._opened("put", name)
        mode: PutMode = "create" if only_if_absent else "overwrite"
        with self._explained("put", name):
            await store.put_async(name, body.cast("B"), mode=mode, use_multipart=False)
        self._bucket_is_there()

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectFacts]]:
        """Yield pages of what begins with `prefix`; see `ObjectStore`."""
        store = self._opened("list", prefix)
        # The client lists whole folders; within one, what stands before the prefix is left out.
        folder, _, rest = prefix.rpartition("/")
        offset = max(after, prefix[:-1] if rest else "")
        stream = store.list(folder or None, offset=offset or None, chunk_size=LIST_PAGE_MAX)
        pages = aiter(stream)
        while True:
            with self._explained("list", prefix):
                page = await anext(pages, None)
            if page is None:
                return
            found = [
                ObjectFacts(one["path"], one["size"], one["last_modified"].timestamp())
                for one in page
                if one["path"].startswith(prefix)
            ]
            if found:
                yield found
            if page and page[-1]["path"] > prefix and not page[-1]["path"].startswith(prefix):
                return

    async def delete(self, names: Sequence[str]) -> None:
        """Delete a batch; see `ObjectStore`.

        Raises:
            UsageError: There are more than DELETE_BATCH_MAX.
        """
        if len(names) > DELETE_BATCH_MAX:
            raise UsageError(
                f"{len(names)} objects to delete at once, but at most {DELETE_BATCH_MAX} can be"
            )
        if not names:
            return
        store = self._opened("delete", names[0])
        try:
            with self._explained("delete", names[0]):
                await store.delete_async(list(names))
        except ObjectError as failure:
            if failure.fault is not ObjectFault.MISSING:
                raise

    async def close(self) -> None:
        """Let go of the client: its connections end with the calls that are under way."""
        self._store = None

    def _opened(self, verb: str, name: str) -> S3Store:
        if self._store is None:
            raise ObjectError(
                f"{verb} {name}: the store is closed", fault=ObjectFault.CLOSED, key=name
            )
        return self._store

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """Raise what the client raises as an `ObjectError`, but for what is our own mistake."""
        try:
            yield
        except (TypeError, ValueError):
            raise
        # Its panics have a class of their own, which is nowhere to be imported from.
        except Exception as error:  # noqa: BLE001
            found = explain(error, verb=verb, name=name, place=self._place)
            if found.fault is ObjectFault.MISSING and verb != "head":
                self._bucket_is_there()
            raise found from None

    def _bucket_is_there(self) -> None:
        self._bucket_seen_until = time.monotonic() + _BUCKET_SEEN_S

    async def _reason(self, name: str, failure: ObjectError) -> ObjectError:
        """Return why HEAD failed: GET says it, asked for one byte."""
        is_known = failure.fault is ObjectFault.MISSING and (
            time.monotonic() < self._bucket_seen_until
        )
        if failure.fault not in _MUTE or is_known:
            return failure
        try:
            await self.get(name, 0, 1)
        except ObjectError as reason:
            return reason
        return failure

    async def _misfit(self, name: str, start: int, size_bytes: int, found: int) -> ObjectError:
        """Return why an answer has not as many bytes as were asked for."""
        facts = await self.head(name)
        what = f"get {name}: {found} bytes came of {size_bytes} from {start} on"
        if found < size_bytes and start + size_bytes > facts.size_bytes:
            return ObjectError(
                f"{what}, but it has {facts.size_bytes}: it is damaged, or not ours",
                fault=ObjectFault.RANGE, key=name,
            )  # fmt: skip
        return ObjectError(
            f"{what}, though it has {facts.size_bytes}: look at proxies on the way if it lasts",
            fault=ObjectFault.TRUNCATED, key=name,
        )  # fmt: skip
