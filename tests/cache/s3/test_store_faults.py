"""Whatever a service or the network does to a call becomes an error that says what to do."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest

from kvx.cache.s3.store import ObjectError, ObjectFacts, ObjectFault
from tests.cache.s3.bad_server import MARKS, Answer, BadServer, Ending, part, refusal
from tests.cache.s3.certificates import write_certificate
from tests.cache.s3.conftest import open_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvx.cache.s3.obstore_store import ObstoreStore

    Serve = Callable[..., BadServer]

NAME = "kvx/v1/object"
SIZE = 100
BODY = bytes(range(SIZE))
RANGE = "Content-Range: bytes 0-99/1000"
VERBS = ["get", "head", "put", "list", "delete"]


async def ask(store: ObstoreStore, verb: str) -> object:
    if verb == "get":
        return bytes(await store.get(NAME, 0, SIZE))
    if verb == "head":
        return await store.head(NAME)
    if verb == "put":
        await store.put(NAME, memoryview(BODY), only_if_absent=True)
    if verb == "list":
        return [one async for page in store.list("kvx/") for one in page]
    if verb == "delete":
        await store.delete([NAME, "kvx/v1/other"])
    return None


async def failure_of(server: BadServer | str, verb: str = "get", **settings: object) -> ObjectError:
    endpoint = server if isinstance(server, str) else server.endpoint
    with pytest.raises(ObjectError) as caught:
        await ask(open_at(endpoint, **settings), verb)
    assert endpoint in str(caught.value)
    assert caught.value.retryable == caught.value.fault.is_transient
    return caught.value


REFUSALS = [
    ("404 Not Found", "NoSuchBucket", ObjectFault.NO_BUCKET, "create it"),
    ("403 Forbidden", "AccessDenied", ObjectFault.DENIED, "s3:ListBucket"),
    ("403 Forbidden", "SignatureDoesNotMatch", ObjectFault.DENIED, "secret are wrong"),
    ("403 Forbidden", "InvalidAccessKeyId", ObjectFault.DENIED, "access key or secret"),
    ("400 Bad Request", "ExpiredToken", ObjectFault.EXPIRED, "renew them"),
    ("403 Forbidden", "RequestTimeTooSkewed", ObjectFault.SKEWED, "NTP"),
    ("400 Bad Request", "AuthorizationHeaderMalformed", ObjectFault.DENIED, "`region`"),
    ("418 I'm a teapot", "", ObjectFault.DENIED, "refuses"),
    ("429 Too Many Requests", "", ObjectFault.THROTTLED, "max_in_flight"),
    ("500 Internal Server Error", "InternalError", ObjectFault.SERVER, "logs"),
    ("502 Bad Gateway", "", ObjectFault.SERVER, "logs"),
    ("503 Slow Down", "SlowDown", ObjectFault.THROTTLED, "fewer requests"),
    ("504 Gateway Timeout", "", ObjectFault.TIMEOUT, "load"),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("status", "code", "fault", "remedy"), REFUSALS)
async def test_a_refusal(
    answering: Serve, verb: str, *, status: str, code: str, fault: ObjectFault, remedy: str
) -> None:
    error = await failure_of(answering(refusal(status, code)), verb)
    assert error.fault is fault
    assert error.errno == int(status[:3])
    assert error.key in {NAME, "kvx/"}
    assert code in str(error) or verb == "head"
    assert remedy in str(error)


@pytest.mark.parametrize("verb", ["get", "head"])
async def test_an_absent_object_is_no_outage(answering: Serve, verb: str) -> None:
    error = await failure_of(answering(refusal("404 Not Found", "NoSuchKey")), verb)
    assert error.fault is ObjectFault.MISSING
    assert not error.fault.is_outage


async def test_deleting_what_is_absent_is_no_error(answering: Serve) -> None:
    store = open_at(answering(refusal("404 Not Found", "NoSuchKey")).endpoint)
    await store.delete([NAME])


@pytest.mark.parametrize(
    ("status", "code"),
    [("412 Precondition Failed", "PreconditionFailed"), ("409 x", "ConditionalRequestConflict")],
)
async def test_an_object_that_is_there_is_a_conflict(
    answering: Serve, status: str, code: str
) -> None:
    server = answering(refusal(status, code))
    error = await failure_of(server, "put")
    assert error.fault is ObjectFault.CONFLICT
    assert "if-none-match: *" in server.requests[0].head


DELETED = (
    "<DeleteResult><Error><Key>{}</Key><Code>AccessDenied</Code><Message>hands off</Message>"
    "</Error></DeleteResult>"
)


async def test_objects_that_could_not_be_deleted(answering: Serve) -> None:
    body = DELETED.format("kvx/v1/other").encode()
    error = await failure_of(answering(Answer(body=body)), "delete")
    assert error.fault is ObjectFault.DENIED
    assert "hands off" in str(error)


async def test_a_panic_of_the_client_is_a_failure_like_others(answering: Serve) -> None:
    """It does not get over an answer about an object that it was not asked to delete."""
    error = await failure_of(answering(Answer(body=DELETED.format("b").encode())), "delete")
    assert error.fault is ObjectFault.PROTOCOL


async def test_an_error_that_is_told_with_status_200(answering: Serve) -> None:
    error = await failure_of(answering(refusal("200 OK", "InternalError")), "delete")
    assert error.fault is ObjectFault.SERVER


async def test_head_that_is_told_to_slow_down_says_so_without_a_second_request(
    answering: Serve,
) -> None:
    server = answering(refusal("503 Slow Down", "SlowDown"))
    assert (await failure_of(server, "head")).fault is ObjectFault.THROTTLED
    assert len(server.requests) == 1


async def test_the_bucket_is_looked_for_once_not_with_every_miss(answering: Serve) -> None:
    server = answering(refusal("404 Not Found", "NoSuchKey"))
    store = open_at(server.endpoint)
    for _ in range(5):
        with pytest.raises(ObjectError, match="no such object"):
            await store.head(NAME)
    assert [one.verb for one in server.requests] == ["HEAD", "GET", *["HEAD"] * 4]


async def test_nothing_secret_is_shown_of_an_answer(answering: Serve) -> None:
    body = (
        "<Error><Code>SignatureDoesNotMatch</Code><Message>no\nmatch</Message><CanonicalRequest>"
        "x-amz-security-token:SECRET</CanonicalRequest></Error>"
    )
    error = await failure_of(answering(Answer("403 Forbidden", body.encode())))
    assert "(no match)" in str(error)
    assert "SECRET" not in str(error)
    # Nor is it in what Python prints of where the error came from.
    assert (error.__cause__, error.__suppress_context__) == (None, True)


BODIES = [
    # Of the right size or of the wrong one, and what it says of that.
    (
        Answer("206 Partial Content", BODY[:50], (RANGE, *MARKS), SIZE, Ending.CLOSE),
        ObjectFault.TRUNCATED, "not arrive whole",
    ),
    (
        Answer("206 Partial Content", BODY[:50], (RANGE, *MARKS), SIZE, Ending.RESET),
        ObjectFault.CONNECTION, "connection was lost",
    ),
    (part(BODY[:50], 0, 1000), ObjectFault.PROTOCOL, "0..100, got 0..50"),
    (part(BODY, 7, 1000), ObjectFault.PROTOCOL, "got 7..107"),
    (part(BODY * 2, 0, 1000), ObjectFault.PROTOCOL, "got 0..200"),
    (Answer("200 OK", BODY, MARKS), ObjectFault.PROTOCOL, "non-partial"),
    (Answer("206 Partial Content", BODY, MARKS), ObjectFault.PROTOCOL, "Content-Range"),
    (refusal("416 Range Not Satisfiable", "InvalidRange"), ObjectFault.RANGE, "shorter"),
    (Answer(raw=b"", ending=Ending.CLOSE), ObjectFault.CONNECTION, "IncompleteMessage"),
    (Answer(raw=b"", ending=Ending.RESET), ObjectFault.CONNECTION, "reset by peer"),
    (Answer(raw=b"SSH-2.0\r\n\r\n", ending=Ending.CLOSE), ObjectFault.PROTOCOL, "`endpoint`"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "fault", "what"), BODIES)
async def test_an_answer_that_is_no_answer(
    answering: Serve, answer: Answer, fault: ObjectFault, what: str
) -> None:
    error = await failure_of(answering(answer))
    assert error.fault is fault
    assert what in str(error)


@pytest.mark.parametrize("size", [0, 50, 99, 101, 150])
async def test_a_body_of_another_size_than_its_range(answering: Serve, size: int) -> None:
    """The client itself believes Content-Length, and looks no further."""
    lie = Answer("206 Partial Content", bytes(size), (RANGE, *MARKS))
    store = open_at(answering(lie, Answer(headers=MARKS, announced=1000)).endpoint)
    with pytest.raises(ObjectError, match=f"{size} bytes came of 100 .* has 1000") as caught:
        await store.get(NAME, 0, SIZE)
    assert caught.value.fault is ObjectFault.TRUNCATED


async def test_an_object_that_ends_too_soon(answering: Serve) -> None:
    short = part(BODY[:50], 0, 50)
    store = open_at(answering(short, Answer(headers=MARKS, announced=50)).endpoint)
    with pytest.raises(ObjectError, match=r"50 bytes came of 100 .* it has 50") as caught:
        await store.get(NAME, 0, SIZE)
    assert caught.value.fault is ObjectFault.RANGE
    assert not caught.value.fault.is_outage


@pytest.mark.parametrize("body", [b"", b"<ListBucketResult>", b"\xff\x00", BODY])
@pytest.mark.parametrize("verb", ["list", "delete"])
async def test_a_list_that_is_none(answering: Serve, verb: str, body: bytes) -> None:
    error = await failure_of(answering(Answer(body=body)), verb)
    assert error.fault is (ObjectFault.PROTOCOL if body else ObjectFault.TRUNCATED)


async def test_a_redirect_names_the_region(answering: Serve) -> None:
    error = await failure_of(answering(refusal("301 Moved Permanently", "PermanentRedirect")))
    assert error.fault is ObjectFault.DENIED
    assert "`region`" in str(error)


@pytest.mark.parametrize("verb", VERBS)
async def test_an_endpoint_that_refuses_connections(verb: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = await failure_of(f"http://127.0.0.1:{port}", verb)
    assert error.fault is ObjectFault.CONNECTION
    assert "refused" in str(error)


async def test_an_endpoint_that_takes_no_connections() -> None:
    """Its queue is full, so the kernel does not answer."""
    began_s = time.monotonic()
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        error = await failure_of(f"http://127.0.0.1:{port}", connect_timeout_s=0.2)
    assert error.fault is ObjectFault.TIMEOUT
    assert "within 0.2 s" in str(error)
    assert time.monotonic() - began_s < 4


@pytest.mark.parametrize("verb", VERBS)
async def test_a_name_that_is_not_known(verb: str) -> None:
    error = await failure_of("http://no-such-host.invalid", verb)
    assert error.fault is ObjectFault.DNS
    assert "resolver" in str(error)


CERTIFICATES = [
    ("127.0.0.1", 1, False, "UnknownIssuer"),
    ("elsewhere.example", 1, True, "NotValidForName"),
    ("127.0.0.1", -1, True, "Expired"),
]


@pytest.mark.parametrize(("host", "days", "is_trusted", "what"), CERTIFICATES)
async def test_a_certificate_that_does_not_fit(
    answering: Serve, tmp_path: Path, *, host: str, days: int, is_trusted: bool, what: str
) -> None:
    pem = write_certificate(tmp_path / "server.pem", host, days=days)
    server = answering(part(BODY, 0, 1000), certificate=pem)
    error = await failure_of(server, ca_file=pem if is_trusted else None)
    assert error.fault is ObjectFault.TLS
    assert what in str(error)
    assert "`ca_file`" in str(error)


async def test_a_certificate_that_fits(answering: Serve, tmp_path: Path) -> None:
    pem = write_certificate(tmp_path / "server.pem")
    server = answering(part(BODY, 0, 1000), certificate=pem)
    assert await ask(open_at(server.endpoint, ca_file=pem), "get") == BODY


async def test_tls_where_none_is_spoken(answering: Serve) -> None:
    server = answering(Answer(raw=b"HTTP/1.1 400 Bad Request\r\n\r\n", ending=Ending.CLOSE))
    error = await failure_of(server.endpoint.replace("http:", "https:"))
    assert error.fault is ObjectFault.TLS
    assert "http or https?" in str(error)


async def test_no_tls_where_it_is_spoken(answering: Serve, tmp_path: Path) -> None:
    server = answering(part(BODY, 0, 1000), certificate=write_certificate(tmp_path / "s.pem"))
    error = await failure_of(server.endpoint.replace("https:", "http:"))
    assert error.fault in {ObjectFault.CONNECTION, ObjectFault.PROTOCOL}


async def test_a_closed_store_asks_nobody(answering: Serve) -> None:
    server = answering(part(BODY, 0, 1000))
    store = open_at(server.endpoint)
    assert await ask(store, "get") == BODY
    await store.close()
    for verb in VERBS:
        with pytest.raises(ObjectError, match="closed") as caught:
            await ask(store, verb)
        assert caught.value.fault is ObjectFault.CLOSED
    assert len(server.requests) == 1


async def test_good_answers_are_what_they_say(answering: Serve) -> None:
    store = open_at(answering(part(BODY, 0, 1000)).endpoint)
    assert await ask(store, "get") == BODY
    assert await ask(store, "head") == ObjectFacts(NAME, SIZE, 1795262400.0)
    assert await ask(store, "put") is None
