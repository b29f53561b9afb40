"""Where the S3 tests find a service, and how they open buckets of it."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

import pytest

from kvx.cache.s3.obstore_store import ObstoreStore, open_store
from kvx.tier_config import S3TierConfig
from tests.cache.s3.bad_server import Answer, BadServer
from tests.cache.s3.memory_store import Bucket
from tests.s3 import servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def open_at(endpoint: str, **settings: object) -> ObstoreStore:
    """Open a bucket of a server that checks no signatures."""
    return open_store(S3TierConfig(**{"bucket": "bucket", "endpoint": endpoint, **settings}))


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the client keys, and nothing else of what this machine's environment may say."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "kvxak")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "kvxsecretkey")


@pytest.fixture
def answering() -> Iterator[Callable[..., BadServer]]:
    """Hand out servers that give these answers, for ever the last."""
    opened: list[BadServer] = []

    def serve(*answers: Answer, **settings: object) -> BadServer:
        opened.append(BadServer(deque(answers), **settings))
        return opened[-1]

    yield serve
    for server in opened:
        server.close()


@pytest.fixture
def bucket_settings(s3_bucket: servers.Bucket, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the settings of a tier in a bucket of its own, of a real server where there is one."""
    keys = s3_bucket.service.keys
    assert keys is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
    return {"endpoint": s3_bucket.service.url, "bucket": s3_bucket.name}


@pytest.fixture
def bucket() -> Bucket:
    """Return an empty bucket in memory."""
    return Bucket()
