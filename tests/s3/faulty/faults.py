"""What can go wrong with one exchange between a client and an S3 server.

A fault is a value with one verb, `play`, which has the exchange in its hands: it may ask the
server, and send the client what it likes of what the server says.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol
from xml.sax.saxutils import escape

from tests.s3.faulty.message import Request, Response, value


class Exchange(Protocol):
    """One request and its answer, as a fault sees them."""

    request: Request
    dice: random.Random

    async def forward(self, *, body: bytes | None = None) -> Response:
        """Ask the server; with another body if there is one."""

    async def send(self, data: bytes) -> None:
        """Send the client some bytes; back when they are with the kernel."""

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""

    async def stand_still(self) -> None:
        """Do nothing until the proxy is thawed, or closed."""

    def hang_up(self) -> NoReturn:
        """Close the connection in good order; ends the exchange."""

    def reset(self) -> NoReturn:
        """Cut the connection; ends the exchange."""


class Fault(Protocol):
    """One thing that goes wrong."""

    async def play(self, exchange: Exchange) -> None:
        """Let it happen."""


@dataclass(frozen=True, slots=True)
class Late:
    """The answer comes later than it could, but is right."""

    seconds: float

    async def play(self, exchange: Exchange) -> None:
        """Wait between asking and answering."""
        response = await exchange.forward()
        await exchange.sleep(self.seconds)
        await _send(exchange, response)


@dataclass(frozen=True, slots=True)
class Drip:
    """The answer is right and endless: a little at a time."""

    part_bytes: int
    seconds: float

    async def play(self, exchange: Exchange) -> None:
        """Send part after part, with a pause before each."""
        response = await exchange.forward()
        await exchange.send(response.head())
        for first in range(0, len(response.body), self.part_bytes):
            await exchange.sleep(self.seconds)
            await exchange.send(response.body[first : first + self.part_bytes])


@dataclass(frozen=True, slots=True)
class Freeze:
    """Nothing comes any more: no answer at all, or none after some bytes of the body."""

    after_bytes: int | None = None
    is_done: bool = True

    async def play(self, exchange: Exchange) -> None:
        """Send what is to come, stand still, and go on when thawed."""
        if not self.is_done:
            await exchange.stand_still()
        response = await exchange.forward()
        if self.after_bytes is None:
            await exchange.stand_still()
            await _send(exchange, response)
        else:
            await _send_some(exchange, response, self.after_bytes)
            await exchange.stand_still()
            await exchange.send(response.body[self.after_bytes :])


@dataclass(frozen=True, slots=True)
class _Break:
    """The connection ends in the middle of the body, or before any answer."""

    after_bytes: int | None = None
    is_done: bool = True

    async def play(self, exchange: Exchange) -> None:
        """Send what is to come, and end it."""
        response = await exchange.forward() if self.is_done else None
        if response is not None and self.after_bytes is not None:
            await _send_some(exchange, response, self.after_bytes)
        self._end(exchange)

    def _end(self, exchange: Exchange) -> NoReturn:
        raise NotImplementedError


class Reset(_Break):
    """The connection is cut."""

    def _end(self, exchange: Exchange) -> NoReturn:
        exchange.reset()


class Truncate(_Break):
    """The connection ends in good order, before the body does."""

    def _end(self, exchange: Exchange) -> NoReturn:
        exchange.hang_up()


@dataclass(frozen=True, slots=True)
class Shorten:
    """The body lacks its end, and the headers agree with that."""

    by_bytes: int = 1

    async def play(self, exchange: Exchange) -> None:
        """Send less."""
        response = await exchange.forward()
        await _send(exchange, response.with_body(response.body[: -self.by_bytes]))


@dataclass(frozen=True, slots=True)
class Lengthen:
    """The body has more than was asked for, and the headers agree with that."""

    by_bytes: int = 1

    async def play(self, exchange: Exchange) -> None:
        """Send more."""
        response = await exchange.forward()
        more = exchange.dice.randbytes(self.by_bytes)
        await _send(exchange, response.with_body(response.body + more))


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of the body is another one."""

    offset: int | None = None

    async def play(self, exchange: Exchange) -> None:
        """Send it so; where nobody said which, the dice do."""
        response = await exchange.forward()
        body = _flipped(response.body, self.offset, exchange.dice)
        await _send(exchange, response.with_body(body))


@dataclass(frozen=True, slots=True)
class FlipUpload:
    """One bit of what the client sends is another one when the server gets it."""

    offset: int | None = None

    async def play(self, exchange: Exchange) -> None:
        """Forward it so; where nobody said which, the dice do."""
        body = _flipped(exchange.request.body, self.offset, exchange.dice)
        await _send(exchange, await exchange.forward(body=body))


@dataclass(frozen=True, slots=True)
class Garble:
    """The body is as long as it should be, and nothing else about it is right."""

    async def play(self, exchange: Exchange) -> None:
        """Send noise."""
        response = await exchange.forward()
        await _send(exchange, response.with_body(exchange.dice.randbytes(len(response.body))))


@dataclass(frozen=True, slots=True)
class ShiftRange:
    """Content-Range says another place than was asked for; the body is what was asked for."""

    by_bytes: int = 1

    async def play(self, exchange: Exchange) -> None:
        """Change the header; an answer without one is left as it is."""
        response = await exchange.forward()
        span = exchange.request.span
        said = value(response.headers, "content-range")
        if span is not None and said is not None:
            first, last = (place + self.by_bytes for place in span)
            text = f"bytes {first}-{last}/{said.rpartition('/')[2]}"
            response = response.with_header("Content-Range", text)
        await _send(exchange, response)


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """The answer to a ranged GET is 200 and begins at the object's first byte.

    What stands before the range is noise: the server has not been asked for it.
    """

    async def play(self, exchange: Exchange) -> None:
        """Send as much more as stands before the range."""
        response = await exchange.forward()
        span = exchange.request.span
        if span is not None and value(response.headers, "content-range") is not None:
            whole = exchange.dice.randbytes(span[0]) + response.body
            headers = tuple(one for one in response.headers if one[0].lower() != "content-range")
            response = replace(response, status="200 OK", headers=headers).with_body(whole)
        await _send(exchange, response)


@dataclass(frozen=True, slots=True)
class Babble:
    """What comes is no HTTP."""

    async def play(self, exchange: Exchange) -> None:
        """Send noise, and hang up."""
        await exchange.send(exchange.dice.randbytes(200).replace(b"\r\n\r\n", b"") + b"\r\n\r\n")
        exchange.hang_up()


@dataclass(frozen=True, slots=True)
class Refuse:
    """An error as S3 writes it.

    Attributes:
        status: Code and reason.
        code: What stands in <Code>; empty for an answer without a body.
        headers: Further ones.
        is_done: Whether the server did what was asked all the same.
    """

    status: str
    code: str
    headers: tuple[tuple[str, str], ...] = field(default=())
    is_done: bool = False

    async def play(self, exchange: Exchange) -> None:
        """Answer; HEAD has no body to say more in."""
        if self.is_done:
            await exchange.forward()
        body = b""
        if self.code and exchange.request.method != "HEAD":
            body = (
                f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{self.code}</Code>'
                f"<Message>made up by a test</Message><Key>{escape(exchange.request.name)}</Key>"
                "<RequestId>0</RequestId></Error>"
            ).encode()
        headers = (*self.headers, ("Content-Type", "application/xml"))
        await _send(exchange, Response(self.status, headers, b"").with_body(body))


# By their <Code>: the status that comes with it.
STATUSES = {
    "AccessDenied": "403 Forbidden",
    "ConditionalRequestConflict": "409 Conflict",
    "ExpiredToken": "400 Bad Request",
    "InternalError": "500 Internal Server Error",
    "InvalidAccessKeyId": "403 Forbidden",
    "InvalidRange": "416 Requested Range Not Satisfiable",
    "NoSuchBucket": "404 Not Found",
    "NoSuchKey": "404 Not Found",
    "PermanentRedirect": "301 Moved Permanently",
    "PreconditionFailed": "412 Precondition Failed",
    "RequestTimeTooSkewed": "403 Forbidden",
    "RequestTimeout": "400 Bad Request",
    "ServiceUnavailable": "503 Service Unavailable",
    "SignatureDoesNotMatch": "403 Forbidden",
    "SlowDown": "503 Slow Down",
    "TooManyRequests": "429 Too Many Requests",
}


def refusal(code: str, *, is_done: bool = False) -> Refuse:
    """Return the error of that <Code>."""
    return Refuse(STATUSES[code], code, is_done=is_done)


# One of each kind, with sizes that fit objects of some KiB; those that take time take little.
CATALOGUE: dict[str, Fault] = {
    "late": Late(0.05),
    "drip": Drip(4096, 0.002),
    "frozen": Freeze(),
    "frozen-undone": Freeze(is_done=False),
    "frozen-in-the-body": Freeze(after_bytes=100),
    "reset": Reset(),
    "reset-undone": Reset(is_done=False),
    "reset-in-the-body": Reset(after_bytes=100),
    "dropped": Truncate(),
    "dropped-undone": Truncate(is_done=False),
    "truncated": Truncate(after_bytes=100),
    "shortened": Shorten(),
    "shortened-to-nothing": Shorten(1 << 40),
    "lengthened": Lengthen(),
    "flipped": Flip(),
    "flipped-upload": FlipUpload(),
    "garbled": Garble(),
    "range-shifted": ShiftRange(),
    "range-ignored": IgnoreRange(),
    "no-http": Babble(),
    "bad-gateway": Refuse("502 Bad Gateway", ""),
    **{f"refused-{code}": refusal(code) for code in STATUSES},
    "failed-but-done": refusal("InternalError", is_done=True),
}


def _flipped(body: bytes, offset: int | None, dice: random.Random) -> bytes:
    changed = bytearray(body)
    if changed:
        changed[dice.randrange(len(changed)) if offset is None else offset] ^= 1 << dice.randrange(
            8
        )
    return bytes(changed)


async def _send(exchange: Exchange, response: Response) -> None:
    await exchange.send(response.head())
    await exchange.send(response.body)


async def _send_some(exchange: Exchange, response: Response, num_bytes: int) -> None:
    await exchange.send(response.head())
    await exchange.send(response.body[:num_bytes])
