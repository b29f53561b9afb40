"""S3 servers for tests: Ceph RGW where it is installed, else moto's; and buckets in them.

    def test_something(s3_bucket: Bucket) -> None: ...        # a real server if there can be one
    def test_another(moto_bucket: Bucket) -> None: ...        # one that starts in no time

One server of a kind serves a whole session; every test has a bucket of its own. moto's asks for no
keys, and its races are not those of a real one: what is about either needs `s3_endpoint`, and
`needs_rgw` where moto's will not do. What they need is imported when it is needed: some machines
run other tests and have none of it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kvx_bench.s3.rgw import Rgw
from kvx_bench.s3.service import Keys, Service

_DELETE_BATCH = 1000
_ANSWERED = pytest.StashKey[str]()


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket that is one test's own.

    Attributes:
        service: Where it is.
        name: Its name.
    """

    service: Service
    name: str

    @property
    def address(self) -> str:
        """Return ``s3://name``."""
        return f"s3://{self.name}"

    @contextlib.contextmanager
    def client(self, **settings: object) -> Iterator[Any]:
        """Open a client of boto3's for it: what a test looks at the server with."""
        with open_client(self.service, **settings) as client:
            yield client

    def put(self, name: str, body: bytes) -> None:
        """Store an object."""
        with self.client() as client:
            client.put_object(Bucket=self.name, Key=name, Body=body)

    def get(self, name: str) -> bytes:
        """Return an object."""
        with self.client() as client:
            body: bytes = client.get_object(Bucket=self.name, Key=name)["Body"].read()
            return body

    def names(self, prefix: str = "") -> list[str]:
        """Return what is in it, in order."""
        with self.client() as client:
            pages = client.get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=self.name, Prefix=prefix)
            return [one["Key"] for page in found for one in page.get("Contents", ())]


@contextlib.contextmanager
def open_client(service: Service, **settings: object) -> Iterator[Any]:
    """Open a client of boto3's; `settings` are those of botocore's Config."""
    boto3 = pytest.importorskip("boto3")
    config = pytest.importorskip("botocore.config")
    keys = service.keys or Keys("anyone", "anything")
    client = boto3.client(
        "s3", endpoint_url=service.url, region_name=service.region,
        aws_access_key_id=keys.access_key, aws_secret_access_key=keys.secret_key,
        config=config.Config(s3={"addressing_style": "path"}, **settings),
    )  # fmt: skip
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def open_bucket(service: Service) -> Iterator[Bucket]:
    """Make a bucket, and remove it with all that is in it."""
    bucket = Bucket(service, f"kvx-{secrets.token_hex(6)}")
    with bucket.client() as client:
        client.create_bucket(Bucket=bucket.name)
        yield bucket
        names = bucket.names()
        for first in range(0, len(names), _DELETE_BATCH):
            batch = [{"Key": name} for name in names[first : first + _DELETE_BATCH]]
            client.delete_objects(Bucket=bucket.name, Delete={"Objects": batch, "Quiet": True})
        client.delete_bucket(Bucket=bucket.name)


@contextlib.contextmanager
def open_moto() -> Iterator[Service]:
    """Start moto's server, in a thread of this process."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Service(f"http://{host}:{port}", keys=Keys("anyone", "anything"), software="moto")
    finally:
        server.stop()


@pytest.fixture(scope="session")
def rgw_or_none(request: pytest.FixtureRequest) -> Iterator[Service | None]:
    """Start Ceph RGW; None where it is not installed."""
    if reason := Rgw.why_not():
        request.config.stash[_ANSWERED] = f"moto's server, for there is no Ceph RGW: {reason}"
        yield None
        return
    with Rgw() as rgw:
        request.config.stash[_ANSWERED] = rgw.service.software
        yield rgw.service


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[Service]:
    """Start moto's server."""
    with open_moto() as service:
        yield service


@pytest.fixture(scope="session")
def s3_endpoint(rgw_or_none: Service | None, request: pytest.FixtureRequest) -> Service:
    """Return Ceph RGW, or moto's server where there is none."""
    if rgw_or_none is not None:
        return rgw_or_none
    service: Service = request.getfixturevalue("moto_endpoint")
    return service


@pytest.fixture(scope="session")
def needs_rgw(rgw_or_none: Service | None) -> Service:
    """Return Ceph RGW; skips where there is none."""
    if rgw_or_none is None:
        pytest.skip(Rgw.why_not())
    return rgw_or_none


@pytest.fixture
def s3_bucket(s3_endpoint: Service) -> Iterator[Bucket]:
    """Make a bucket in `s3_endpoint`."""
    with open_bucket(s3_endpoint) as bucket:
        yield bucket


@pytest.fixture
def moto_bucket(moto_endpoint: Service) -> Iterator[Bucket]:
    """Make a bucket in moto's server."""
    with open_bucket(moto_endpoint) as bucket:
        yield bucket


def what_answered(config: pytest.Config) -> str:
    """Return which server `s3_endpoint` was in this run; empty when nobody asked."""
    return config.stash.get(_ANSWERED, "")
