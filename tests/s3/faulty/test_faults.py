"""Every fault is what a client meets: here a client that believes everything, http.client."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvx_bench.s3.service import Service
from tests.s3.faulty.faults import (
    CATALOGUE,
    STATUSES,
    Babble,
    Drip,
    Fault,
    Flip,
    FlipUpload,
    Freeze,
    Garble,
    IgnoreRange,
    Late,
    Lengthen,
    Reset,
    ShiftRange,
    Shorten,
    Truncate,
    refusal,
)
from tests.s3.faulty.proxy import FaultProxy, Rule
from tests.s3.servers import Bucket

BODY = bytes(range(256)) * 40
SOON_S = 0.2
PATIENCE_S = 20.0
# moto asks for a signature, and takes any.
SIGNED = {"Authorization": "AWS anyone:anything"}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Scene:
    """A proxy before an object `a` with `BODY` in it."""

    proxy: FaultProxy
    bucket: Bucket

    def meet(self, fault: Fault) -> None:
        self.proxy.rules = (Rule(fault),)

    def ask(
        self,
        method: str = "GET",
        *,
        span: str = "",
        body: bytes = b"",
        timeout_s: float = PATIENCE_S,
    ) -> Answer:
        return ask(
            self.proxy.service, method, f"/{self.bucket.name}/a", span=span, body=body,
            timeout_s=timeout_s,
        )  # fmt: skip

    def right(self) -> bytes:
        return self.bucket.get("a")


def ask(
    service: Service, method: str, path: str, *, span: str = "", body: bytes = b"",
    timeout_s: float = PATIENCE_S,
) -> Answer:  # fmt: skip
    headers = SIGNED | ({"Range": f"bytes={span}"} if span else {})
    connection = http.client.HTTPConnection(*service.address, timeout=timeout_s)
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


@pytest.fixture
def scene(moto_bucket: Bucket) -> Iterator[Scene]:
    moto_bucket.put("a", BODY)
    with FaultProxy(moto_bucket.service, seed=3) as proxy:
        yield Scene(proxy, moto_bucket)


def test_without_rules_nothing_is_changed(scene: Scene) -> None:
    assert scene.ask().body == BODY
    part = scene.ask(span="10-19")
    assert (part.status, part.body) == (206, BODY[10:20])
    head = scene.ask("HEAD")
    assert (head.headers["Content-Length"], head.body) == (str(len(BODY)), b"")
    scene.ask("PUT", body=b"new")
    assert scene.right() == b"new"
    assert [one.fault for one in scene.proxy.seen] == [None] * 4
    assert [one.request.method for one in scene.proxy.seen] == ["GET", "GET", "HEAD", "PUT"]
    assert all(one.is_heard for one in scene.proxy.seen)


def test_late(scene: Scene) -> None:
    scene.meet(Late(SOON_S))
    began = time.monotonic()
    assert scene.ask().body == BODY
    assert time.monotonic() - began >= SOON_S


def test_drip(scene: Scene) -> None:
    scene.meet(Drip(len(BODY) // 4, SOON_S / 4))
    began = time.monotonic()
    assert scene.ask().body == BODY
    assert time.monotonic() - began >= SOON_S


@pytest.mark.parametrize("fault", [Freeze(), Freeze(is_done=False)])
def test_a_frozen_exchange_never_answers(scene: Scene, fault: Freeze) -> None:
    scene.meet(fault)
    with pytest.raises(TimeoutError):
        scene.ask("PUT", body=b"new", timeout_s=SOON_S)
    assert (scene.right() == b"new") == fault.is_done
    assert not scene.proxy.seen[-1].is_heard


def test_one_that_freezes_in_the_body_has_sent_so_much(scene: Scene) -> None:
    scene.meet(Freeze(after_bytes=100))
    connection = http.client.HTTPConnection(*scene.proxy.service.address, timeout=PATIENCE_S)
    connection.request("GET", f"/{scene.bucket.name}/a", headers=SIGNED)
    response = connection.getresponse()
    assert response.read(100) == BODY[:100]
    assert connection.sock is not None
    connection.sock.settimeout(SOON_S)
    with pytest.raises(TimeoutError):
        response.read(1)
    scene.proxy.thaw()
    connection.sock.settimeout(PATIENCE_S)
    assert connection.sock.recv(10) == BODY[100:110]
    response.close()
    connection.close()


@pytest.mark.parametrize("fault", [Reset(), Reset(is_done=False)])
def test_a_reset_before_the_answer(scene: Scene, fault: Reset) -> None:
    scene.meet(fault)
    with pytest.raises(ConnectionResetError):
        scene.ask("PUT", body=b"new")
    assert (scene.right() == b"new") == fault.is_done


def test_a_reset_in_the_body(scene: Scene) -> None:
    scene.meet(Reset(after_bytes=100))
    with pytest.raises(ConnectionResetError):
        scene.ask()


@pytest.mark.parametrize("fault", [Truncate(), Truncate(is_done=False)])
def test_a_dropped_exchange(scene: Scene, fault: Truncate) -> None:
    scene.meet(fault)
    with pytest.raises(http.client.RemoteDisconnected):
        scene.ask("PUT", body=b"new")
    assert (scene.right() == b"new") == fault.is_done


def test_a_truncated_body(scene: Scene) -> None:
    scene.meet(Truncate(after_bytes=100))
    with pytest.raises(http.client.IncompleteRead) as cut:
        scene.ask()
    assert cut.value.partial == BODY[:100]
    assert cut.value.expected == len(BODY) - 100


def test_bodies_of_another_length_look_whole(scene: Scene) -> None:
    scene.meet(Shorten(3))
    assert scene.ask().body == BODY[:-3]
    scene.meet(Lengthen(3))
    longer = scene.ask(span="0-9")
    assert longer.body[:10] == BODY[:10]
    assert len(longer.body) == 13


def test_exactly_one_bit_is_flipped(scene: Scene) -> None:
    scene.meet(Flip())
    assert num_bits_between(scene.ask().body, BODY) == 1
    scene.meet(Flip(offset=7))
    assert scene.ask().body[7] != BODY[7]


def test_a_bit_is_flipped_on_its_way_up(scene: Scene) -> None:
    scene.meet(FlipUpload())
    assert scene.ask("PUT", body=BODY).status == 200
    assert num_bits_between(scene.right(), BODY) == 1


def test_a_garbled_body_has_its_length(scene: Scene) -> None:
    scene.meet(Garble())
    body = scene.ask().body
    assert len(body) == len(BODY)
    assert num_bits_between(body, BODY) > len(BODY)


def test_a_range_that_was_not_asked_for(scene: Scene) -> None:
    scene.meet(ShiftRange(5))
    part = scene.ask(span="10-19")
    assert part.headers["Content-Range"] == f"bytes 15-24/{len(BODY)}"
    assert part.body == BODY[10:20]


def test_an_ignored_range(scene: Scene) -> None:
    scene.meet(IgnoreRange())
    whole = scene.ask(span="10-19")
    assert whole.status == 200
    assert "Content-Range" not in whole.headers
    assert len(whole.body) == 20
    assert whole.body[10:] == BODY[10:20]


def test_no_http(scene: Scene) -> None:
    scene.meet(Babble())
    with pytest.raises(http.client.HTTPException):
        scene.ask()


@pytest.mark.parametrize("code", STATUSES)
def test_a_refusal_names_its_code(scene: Scene, code: str) -> None:
    scene.meet(refusal(code))
    answer = scene.ask()
    assert answer.status == int(STATUSES[code][:3])
    assert f"<Code>{code}</Code>".encode() in answer.body
    assert scene.ask("HEAD").status == answer.status


def test_a_refusal_can_be_a_lie(scene: Scene) -> None:
    scene.meet(refusal("InternalError"))
    assert scene.ask("PUT", body=b"new").status == 500
    assert scene.right() == BODY
    scene.meet(refusal("InternalError", is_done=True))
    assert scene.ask("PUT", body=b"new").status == 500
    assert scene.right() == b"new"


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_line_is_sound_after_every_fault(scene: Scene, name: str) -> None:
    scene.meet(CATALOGUE[name])
    with contextlib.suppress(http.client.HTTPException, ConnectionError, TimeoutError):
        scene.ask(span="100-4999", timeout_s=SOON_S)
    scene.proxy.rules = ()
    assert scene.ask(span="100-4999").body == BODY[100:5000]
    assert [one.fault for one in scene.proxy.seen] == [CATALOGUE[name], None]


def test_a_client_that_has_left_has_heard_nothing(scene: Scene) -> None:
    scene.meet(Freeze())
    with pytest.raises(TimeoutError):
        scene.ask(timeout_s=SOON_S)
    scene.proxy.thaw()
    scene.proxy.rules = ()
    scene.ask()
    assert [one.is_heard for one in scene.proxy.seen] == [False, True]


def test_chunks_reach_the_server_whole(scene: Scene) -> None:
    host, port = scene.proxy.service.address
    with socket.create_connection((host, port), PATIENCE_S) as line:
        line.sendall(f"PUT /{scene.bucket.name}/a HTTP/1.1\r\nHost: {host}\r\n".encode())
        line.sendall(f"Authorization: {SIGNED['Authorization']}\r\n".encode())
        line.sendall(b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 100 ")
        line.sendall(b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nTrailer: x\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 200 ")
    assert scene.proxy.seen[-1].request.body == b"abcdefg"


def num_bits_between(one: bytes, other: bytes) -> int:
    assert len(one) == len(other)
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))
