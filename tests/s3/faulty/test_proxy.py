"""Which exchange goes wrong, and the line as a whole."""

from __future__ import annotations

import http.client
import random
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvx_bench.s3.service import Service
from tests.s3.faulty.faults import Flip, Freeze, Late, refusal
from tests.s3.faulty.identity import make_identity
from tests.s3.faulty.proxy import FaultProxy, Rule
from tests.s3.faulty.test_faults import SOON_S, ask
from tests.s3.servers import Bucket, open_client

SLOW_DOWN = refusal("SlowDown")
NUM_NAMES = 200


@pytest.fixture
def proxy(moto_endpoint: Service) -> Iterator[FaultProxy]:
    with FaultProxy(moto_endpoint) as made:
        yield made


def statuses(proxy: FaultProxy, names: Sequence[str], *, num_threads: int = 4) -> dict[str, int]:
    with ThreadPoolExecutor(num_threads) as threads:
        found = threads.map(lambda name: ask(proxy.service, "GET", f"/bucket/{name}"), names)
        return {name: one.status for name, one in zip(names, found, strict=True)}


def refused(seed: int, server: Service, *, order: int) -> set[str]:
    """Return which of the names a tenth of which is refused were, asked for in some order."""
    names = [f"n{number}" for number in range(NUM_NAMES)]
    random.Random(order).shuffle(names)
    with FaultProxy(server, seed=seed) as proxy:
        proxy.rules = (Rule(SLOW_DOWN, share=0.1),)
        return {name for name, status in statuses(proxy, names).items() if status == 503}


def test_a_seed_decides_and_the_order_does_not(moto_endpoint: Service) -> None:
    first = refused(1, moto_endpoint, order=1)
    assert refused(1, moto_endpoint, order=2) == first
    assert refused(2, moto_endpoint, order=1) != first
    assert 0.03 * NUM_NAMES < len(first) < 0.2 * NUM_NAMES


def test_attempts_at_the_same_thing_are_counted(proxy: FaultProxy) -> None:
    proxy.rules = (Rule(SLOW_DOWN, attempts_max=2),)
    paths = ["/bucket/a", "/bucket/b", "/bucket/a", "/bucket/a", "/bucket/b", "/bucket/b"]
    found = [ask(proxy.service, "GET", path).status for path in paths]
    assert found == [503, 503, 503, 404, 503, 404]
    assert [one.request.attempt for one in proxy.seen] == [1, 1, 2, 3, 2, 3]
    # Another range of an object is another thing.
    assert ask(proxy.service, "GET", "/bucket/a", span="0-1").status == 503


def test_the_first_rule_that_fits_decides(proxy: FaultProxy) -> None:
    proxy.rules = (
        Rule(refusal("AccessDenied"), method="GET", name="*/secret"),
        Rule(refusal("InternalError"), when=lambda request: request.span == (0, 9)),
        Rule(refusal("NoSuchKey"), method="PUT"),
    )
    assert ask(proxy.service, "GET", "/bucket/a/secret", span="0-9").status == 403
    assert ask(proxy.service, "GET", "/bucket/secret", span="0-9").status == 500
    assert ask(proxy.service, "PUT", "/bucket/a%2Fsecret", body=b"x").status == 404
    assert [one.request.name for one in proxy.seen] == ["a/secret", "secret", "a/secret"]
    assert (proxy.count(), proxy.count(method="GET")) == (3, 2)


def test_a_frozen_line_goes_on_where_it_stood(proxy: FaultProxy) -> None:
    answers = []
    with proxy.frozen():
        with pytest.raises(TimeoutError):
            ask(proxy.service, "GET", "/bucket/a", timeout_s=SOON_S)
        waiting = threading.Thread(
            target=lambda: answers.append(ask(proxy.service, "GET", "/bucket/b").status)
        )
        waiting.start()
        assert proxy.count() == 0
    waiting.join()
    assert answers == [404]


def test_a_line_that_refuses_cuts_who_comes_and_who_is_there(proxy: FaultProxy) -> None:
    standing = http.client.HTTPConnection(*proxy.service.address, timeout=5)
    standing.request("GET", "/bucket/a")
    standing.getresponse().read()
    with proxy.refusing():
        with pytest.raises(ConnectionError):
            standing.request("GET", "/bucket/a")  # the reset has arrived: there is no line
        with pytest.raises(ConnectionError):
            ask(proxy.service, "GET", "/bucket/a")
    standing.close()
    assert ask(proxy.service, "GET", "/bucket/a").status == 404
    assert proxy.num_connects == 3


def test_connections_stay(proxy: FaultProxy) -> None:
    connection = http.client.HTTPConnection(*proxy.service.address, timeout=5)
    for _ in range(5):
        connection.request("GET", "/bucket/a")
        connection.getresponse().read()
    connection.close()
    assert proxy.num_connects == 1


def test_closing_ends_what_stands_still(moto_endpoint: Service) -> None:
    proxy = FaultProxy(moto_endpoint)
    proxy.rules = (Rule(Freeze()),)
    failed = threading.Event()

    def wait() -> None:
        try:
            ask(proxy.service, "GET", "/bucket/a")
        except (ConnectionError, http.client.HTTPException):
            failed.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not proxy.count():
        pass
    proxy.close()
    waiting.join()
    assert failed.is_set()
    proxy.close()


def test_signatures_survive_it(s3_bucket: Bucket) -> None:
    body = bytes(range(256)) * 8192
    with FaultProxy(s3_bucket.service) as proxy, open_client(proxy.service) as client:
        where = {"Bucket": s3_bucket.name, "Key": "a b/c+d"}
        client.put_object(**where, Body=body)
        assert client.get_object(**where)["Body"].read() == body
        part = client.get_object(**where, Range="bytes=5-1000004")["Body"].read()
        assert part == body[5:1000005]
        assert client.head_object(**where)["ContentLength"] == len(body)
        proxy.rules = (Rule(Flip(), method="GET"), Rule(Late(0), method="PUT"))
        assert client.get_object(**where)["Body"].read() != body
        client.delete_object(**where)
    assert s3_bucket.names() == []
    assert {one.request.name for one in proxy.seen} == {"a b/c+d"}


def test_it_speaks_tls(moto_endpoint: Service, tmp_path: Path) -> None:
    identity = make_identity(tmp_path)
    trusting = ssl.create_default_context(cafile=str(identity.ca_file))
    with FaultProxy(moto_endpoint, identity=identity.context) as proxy:
        assert proxy.service.is_tls
        assert status_over_tls(proxy, trusting) == 404
        with pytest.raises(ssl.SSLCertVerificationError, match="self-signed"):
            status_over_tls(proxy, ssl.create_default_context())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [({"host": "127.0.0.2"}, "not valid for"), ({"is_expired": True}, "expired")],
)
def test_identities_can_be_wrong(
    moto_endpoint: Service, tmp_path: Path, wrong: dict[str, object], complaint: str
) -> None:
    identity = make_identity(tmp_path, **wrong)
    trusting = ssl.create_default_context(cafile=str(identity.ca_file))
    with (
        FaultProxy(moto_endpoint, identity=identity.context) as proxy,
        pytest.raises(ssl.SSLCertVerificationError, match=complaint),
    ):
        status_over_tls(proxy, trusting)


def status_over_tls(proxy: FaultProxy, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection(*proxy.service.address, timeout=5, context=context)
    try:
        connection.request("GET", "/bucket/a")
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()
